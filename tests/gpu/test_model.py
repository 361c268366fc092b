"""The model of the time counts the kernels that the backend launches, and the bytes they have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import net.reference
from bench import gpu_model, gpu_naive
from bench.gpu_model import BATCHES, CARDS, H100, PRECISIONS, Setting
from net.alexnet import alexnet, table
from net.gpu import kernels
from net.layers import Run, fuse
from net.network import initial_parameters, parameter_shapes
from tests.gpu import standin, test_network
from tests.gpu.shim import build
from tests.net import cases

SHAPE, IMAGES = (test_network.SIDE, test_network.SIDE, 3), 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_model_has_the_kernels_of_a_training_step(
    backend: Callable[[str], ModuleType], pretended: standin.Machine, precision: str
) -> None:
    ops = backend(precision)
    step, *_ = test_network.start(ops, "paper")
    uploaded = ops.upload(test_network.batch(0, IMAGES))
    build.settings.launches.clear()
    products = pretended.products
    step(uploaded)
    launched = Counter(build.settings.launches)
    layers = test_network.small(alexnet(test_network.CLASSES))
    modelled = gpu_model.training_step(layers, SHAPE, test_network.CROP, Setting(H100, precision, IMAGES))
    expected = Counter(kernel.name for kernel in modelled)
    assert pretended.products - products == expected.pop("product")
    assert launched == expected


def test_the_model_has_the_kernels_of_a_prediction(
    backend: Callable[[str], ModuleType], pretended: standin.Machine
) -> None:
    ops = backend("bf16")
    layers = test_network.small(alexnet(test_network.CLASSES))
    host = initial_parameters(parameter_shapes(layers, SHAPE), (0.0,) * 8, (0.1,) * 8, 1)
    parameters = {name: ops.asarray(a) for name, a in host.items()}
    inputs = ops.upload(test_network.batch(0, IMAGES))
    build.settings.launches.clear()
    names = ("images", "corner", "flip", "shift")
    x = ops.augment(*(inputs[n] for n in names), mean=None, scale=1.0, bgr=False, border=(2, 1))
    for layer in fuse(layers, ops):
        x, _ = layer.forward(ops, parameters, x, Run(training=False))
    ops.softmax(x)
    modelled = gpu_model.prediction(layers, SHAPE, test_network.CROP, Setting(H100, "bf16", IMAGES))
    expected = Counter(kernel.name for kernel in modelled)
    del expected["product"]
    assert Counter(build.settings.launches) == expected


def test_the_products_are_those_of_the_network() -> None:
    """Forward once, backward twice, but conv1's input needs no gradient; fillings of rows are not counted twice."""
    layers = alexnet(1000)
    rows = table(layers)
    forward = sum(2 * row.multiply_adds for row in rows)
    s = Setting(H100, "bf16", 128)
    counted = sum(k.products for k in gpu_model.prediction(layers, (227, 227, 3), 224, s)) / s.batch
    filled = 2 * rows[0].multiply_adds * (432 / 363 - 1)  # conv1's window of 11 pixels becomes 3 x 4
    assert counted == pytest.approx(forward + filled, rel=1e-6)
    counted = sum(k.products for k in gpu_model.training_step(layers, (227, 227, 3), 224, s)) / s.batch
    assert counted == pytest.approx(3 * forward - 2 * rows[0].multiply_adds + 2 * filled, rel=1e-6)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_predictions_lie_within_what_a_card_can_do(card: gpu_model.Card) -> None:
    for precision in PRECISIONS:
        for batch in BATCHES:
            s = Setting(card, precision, batch)
            kernels = gpu_model.training_step(gpu_model.LAYERS, gpu_model.SHAPE, gpu_model.CROP, s)
            seconds = sum(k.seconds(card, precision) for k in kernels)
            assert sum(k.bytes for k in kernels) / card.bandwidth < seconds
            assert sum(k.products for k in kernels) / card.peak[precision] < seconds
            assert seconds < 1


def test_the_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_model.main([])
    text = capsys.readouterr().out
    assert text.count("| H100 SXM |") == 4
    assert gpu_model.by_layer(Setting(H100, "bf16", 128)) in text
    gpu_model.main(["--precision", "tf32", "--batch", "1024", "--card", "RTX 4090"])
    assert "RTX 4090, tf32, batch 1024, a training step by layer" in capsys.readouterr().out


@pytest.mark.parametrize("case", [c for c in cases.ALL if not c.layer and not c.nan][::9], ids=str)
def test_the_naive_port_is_the_reference(case: cases.Case) -> None:
    """With NumPy in CuPy's place: the changed text runs and computes the same."""
    naive = gpu_naive.load("numpy")
    assert naive is not net.reference
    for got, expected in zip(cases.run(naive, case), cases.run(net.reference, case), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_the_naive_port_calls_nothing_of_numpys() -> None:
    """NumPy's functions refuse CuPy's arrays, which no test without a card would see."""
    folder = Path(net.reference.__file__).parent
    for path in folder.glob("*.py"):
        text = gpu_naive.changed(path.read_text(), "cupy")
        lines = [line for line in text.splitlines() if re.match(r"(from|import) numpy\b(?!\.typing)", line)]
        assert not lines, f"{path.name}: {lines}"


def test_the_page_has_the_models_tables_and_every_kernel() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gpu_tables.md").read_text()
    assert gpu_model.summary() in page, "run python -m bench.gpu_model and put its tables into docs/gpu_tables.md"
    assert gpu_model.by_layer(Setting(H100, "bf16", 128)) in page
    for name in kernels.signatures():
        assert f"| {name} |" in page, "run python -m tests.gpu.cubins and put its table into docs/gpu_tables.md"
