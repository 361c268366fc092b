"""What a list of layers is turned into for a backend with fused operations."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from net import reference
from net.alexnet import alexnet
from net.backend import FUSED_OPERATIONS
from net.layers import Conv, ConvBlock, Dropout, Flatten, Layer, Linear, LinearBlock, Lrn, MaxPool, Relu, Run, fuse
from net.network import parameter_shapes

ALL = cast(ModuleType, SimpleNamespace(**dict.fromkeys(FUSED_OPERATIONS)))  # offers every fused operation


@dataclass(frozen=True)
class Slope(Relu):
    """A layer that somebody derives from one of ours, with a field of its own."""

    slope: float = 0.1


class OtherConv(Conv):
    pass


class OtherLinear(Linear):
    pass


class AveragePool(MaxPool):
    pass


class OtherLrn(Lrn):
    pass


CONV, LINEAR, LRN, POOL = Conv("conv1", 4, 3), Linear("fc6", 4), Lrn(5, 2.0, 1.0, 0.75), MaxPool(3, 2)


def kinds(*layers: Layer) -> list[type]:
    return [type(layer) for layer in fuse(layers, ALL)]


@pytest.mark.parametrize(("relu_before_lrn", "last"), [(True, False), (False, True)])
def test_a_block_for_each_layer_with_a_relu(relu_before_lrn: bool, last: bool) -> None:
    blocks = [layer for layer in fuse(alexnet(10, relu_before_lrn=relu_before_lrn), ALL) if layer.names]
    assert [type(block) for block in blocks] == [ConvBlock] * 5 + [LinearBlock] * 2 + [Linear]
    assert [block.relu_last for block in blocks if isinstance(block, ConvBlock)] == [last] + [False] * 4


def test_what_only_looks_like_the_layers_of_a_block_is_not_put_into_one() -> None:
    assert kinds(CONV, Slope()) == [Conv, Slope]
    assert kinds(LINEAR, Slope()) == [Linear, Slope]
    assert kinds(OtherConv("conv1", 4, 3), Relu()) == [OtherConv, Relu]
    assert kinds(OtherLinear("fc6", 4), Relu()) == [OtherLinear, Relu]
    assert kinds(CONV, Relu(), AveragePool(3, 2)) == [ConvBlock, AveragePool]
    assert kinds(CONV, Relu(), OtherLrn(5, 2.0, 1.0, 0.75), POOL) == [ConvBlock, OtherLrn, MaxPool]
    assert kinds(CONV, POOL, Slope()) == [Conv, MaxPool, Slope]
    assert kinds(CONV, AveragePool(3, 2), Relu()) == [Conv, AveragePool, Relu]


def test_a_relu_with_a_field_of_another_value_is_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("net.layers.Relu", Slope)
    assert kinds(CONV, Slope()) == [ConvBlock]
    assert kinds(CONV, Slope(0.2)) == [Conv, Slope]


@dataclass(frozen=True)
class PaddedPool(MaxPool):
    pad: int = 1


def test_backends_are_told_every_field_of_a_blocks_layers() -> None:
    """One that they do not know of must not be lost on the way."""
    told: dict[str, Any] = {}
    ops = cast(ModuleType, SimpleNamespace(conv_block_forward=lambda x, w, b, **options: (0, told.update(options))))
    ConvBlock(CONV, LRN, PaddedPool(3, 2)).forward(ops, {"conv1.w": 0, "conv1.b": 0}, 0, Run(training=False))
    assert (told["lrn"], told["pool"]) == ((5, 2.0, 1.0, 0.75), (3, 2, 1))


@pytest.mark.parametrize(("scale_in_training", "factor"), [(False, 0.75), (True, 1.0)])
def test_a_test_pass_through_dropout_has_a_way_back(scale_in_training: bool, factor: float) -> None:
    dropout, x = Dropout(6, 0.75, scale_in_training), np.array([[1.0, -2.0]], np.float32)
    y, kept = dropout.forward(reference, {}, x, Run(training=False))
    dx, _ = dropout.backward(reference, {}, x, kept, need_dx=True)
    np.testing.assert_array_equal(y, x * np.float32(factor))
    np.testing.assert_array_equal(dx, x * np.float32(factor))


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((Conv("a", 4, 3), Conv("a", 4, 3)), "two layers have parameters named a.w, a.b"),
        ((Conv("a", 4, 3, groups=2),), "a: 2 groups cannot share 3 channels and 4 maps"),
        ((Conv("a", 4, 3), Conv("b", 5, 3, groups=2)), "b: 2 groups cannot share 4 channels and 5 maps"),
        ((Conv("a", 4, 3), Linear("b", 2)), r"b takes features, not maps of \(14, 10, 4\)"),
        ((Conv("a", 4, 11), POOL, Flatten(), Linear("b", 2)), "nothing is left of .* after MaxPool"),
        ((Conv("a", 4, 13),), "nothing is left of .* after Conv"),
    ],
    ids=["name", "channels", "maps", "no flatten", "pool", "convolution"],
)
def test_layers_that_do_not_fit_are_refused_in_a_sentence(layers: tuple[Layer, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parameter_shapes(layers, (16, 12, 3))
