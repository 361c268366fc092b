"""The fused operations against the same composition in the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest

from net import reference
from net.gpu import blocks, convolution
from tests.gpu import standin
from tests.gpu.conftest import REAL
from tests.gpu.standin import round_to_bf16
from tests.net import cases

Lrn = tuple[int, float, float, float]


@dataclass(frozen=True)
class Block:
    name: str
    x: tuple[int, int, int, int]
    kernel: tuple[int, int]
    maps: int
    stride: int = 1
    pad: int = 0
    groups: int = 1
    lrn: Lrn | None = None
    pool: tuple[int, int] | None = None
    relu_last: bool = False

    def __str__(self) -> str:
        return self.name


FIVE = (5, 2.0, 1.0, 0.75)
BLOCKS = [
    Block("all of it, conv1", (2, 63, 51, 3), (11, 11), 96, stride=4, lrn=(5, 2.0, 1e-4, 0.75), pool=(3, 2)),
    Block("all of it, alpha 1", (2, 13, 11, 4), (3, 3), 16, pad=1, lrn=FIVE, pool=(3, 2)),
    Block("two groups, 256 maps", (2, 9, 7, 8), (5, 5), 256, pad=2, groups=2, lrn=FIVE, pool=(3, 2)),
    Block("window of 4", (1, 7, 9, 3), (3, 3), 8, lrn=(4, 2.0, 1.0, 0.75), pool=(3, 2)),
    Block("window of 3", (2, 7, 6, 3), (3, 3), 8, lrn=(3, 1.0, 1.0, 0.75), pool=(3, 2)),
    Block("window of 9, beta 0.5", (2, 7, 6, 3), (3, 3), 12, lrn=(9, 1.0, 0.5, 0.5), pool=(2, 2)),
    Block("odd maps", (3, 8, 9, 5), (3, 2), 7, lrn=FIVE, pool=(3, 2)),
    Block("33 maps", (1, 9, 8, 2), (2, 2), 33, lrn=FIVE, pool=(3, 2)),
    Block("300 maps", (1, 5, 6, 2), (3, 3), 300, lrn=(7, 1.0, 1.0, 0.75), pool=(2, 1)),
    Block("4 maps", (2, 6, 7, 3), (3, 3), 4, lrn=FIVE, pool=(3, 2)),
    Block("one map, one image", (1, 6, 5, 1), (3, 3), 1, lrn=FIVE, pool=(3, 2)),
    Block("LRN alone", (2, 9, 7, 3), (3, 3), 24, lrn=FIVE),
    Block("LRN alone, odd", (2, 5, 7, 3), (3, 3), 9, lrn=(5, 1.0, 1.0, 1.0)),
    Block("pool alone, conv5", (3, 13, 13, 12), (3, 3), 32, pad=1, groups=2, pool=(3, 2)),
    Block("pool alone, odd", (2, 8, 11, 3), (3, 3), 5, pool=(3, 2)),
    Block("pool with gaps", (2, 12, 11, 3), (3, 3), 8, pool=(2, 3)),
    Block("pool without overlap", (2, 11, 8, 3), (3, 3), 8, lrn=FIVE, pool=(3, 3)),
    Block("pool of every pixel", (2, 5, 8, 3), (3, 3), 8, pool=(3, 1)),
    Block("neither", (2, 6, 7, 8), (3, 3), 12, pad=1, groups=2),
    Block("neither, odd", (1, 5, 4, 3), (3, 3), 5, stride=2, pad=1),
    Block("ReLU last, conv1", (2, 27, 23, 3), (11, 11), 96, stride=4, lrn=FIVE, pool=(3, 2), relu_last=True),
    Block("ReLU last, without LRN", (2, 9, 12, 3), (3, 3), 8, pool=(2, 1), relu_last=True),
    Block("ReLU last, odd maps", (2, 8, 9, 5), (3, 2), 7, lrn=FIVE, pool=(2, 2), relu_last=True),
]


def draw(block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    random = cases.random_for(block.name)
    channels = block.x[3] // block.groups

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    x, w, b = normal(*block.x), normal(*block.kernel, channels, block.maps) / 4, normal(block.maps)
    with np.errstate(invalid="ignore"):
        dy = normal(*forward(block, x, w, b)[0].shape)
    return x, w, b, dy


def forward(block: Block, x: np.ndarray, w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    c = reference.conv2d_forward(x, w, b, stride=block.stride, pad=block.pad, groups=block.groups)
    a = c if block.relu_last else reference.relu_forward(c)
    kept, y = [a], a
    if block.lrn:
        size, k, alpha, beta = block.lrn
        y, s = reference.lrn_forward(y, size=size, k=k, alpha=alpha, beta=beta)
        kept.append(s)
    if block.pool:
        y, winner = reference.maxpool_forward(y, size=block.pool[0], stride=block.pool[1])
        kept.append(winner)
    if block.relu_last:
        y = reference.relu_forward(y)
        kept.append(y)
    return y, kept


def backward(block: Block, dy: np.ndarray, kept: list[np.ndarray], x: np.ndarray, w: np.ndarray) -> tuple:
    a, *rest = kept
    if block.relu_last:
        dy = reference.relu_backward(dy, rest.pop())
    if block.pool:
        size, stride = block.pool
        height, width = a.shape[1:3]
        dy = reference.maxpool_backward(dy, rest.pop(), height=height, width=width, size=size, stride=stride)
    if block.lrn:
        size, _, alpha, beta = block.lrn
        dy = reference.lrn_backward(dy, a, rest.pop(), size=size, alpha=alpha, beta=beta)
    if not block.relu_last:
        dy = reference.relu_backward(dy, a)
    return reference.conv2d_backward(dy, x, w, stride=block.stride, pad=block.pad, groups=block.groups, need_dx=True)


def operations(ops: ModuleType, block: Block) -> tuple[Callable, Callable]:
    """Forward and backward."""
    if block.relu_last:
        return ops.conv_block_relu_last_forward, ops.conv_block_relu_last_backward
    return ops.conv_block_forward, ops.conv_block_backward


def options(block: Block) -> dict:
    names = ("stride", "pad", "groups", "lrn", "pool")
    return {name: getattr(block, name) for name in names}


def check(ops: ModuleType, block: Block, tolerance: float, *, need_dx: bool = True) -> None:
    x, w, b, dy = draw(block)
    wide = [a.astype(np.float64) for a in (x, w, b, dy)]
    expected, kept = forward(block, *wide[:3])
    gradients = backward(block, wide[3], kept, wide[0], wide[1])
    arrays = [ops.asarray(a) for a in (x, w, b)]
    block_forward, block_backward = operations(ops, block)
    y, kept = block_forward(*arrays, **options(block), training=True)
    cases.assert_close(ops.to_host(y), expected, tolerance, f"{block}, y")
    got = block_backward(ops.asarray(dy), kept, arrays[1], **options(block), need_dx=need_dx)
    for name, g, e in zip(("dx", "dw", "db"), got, gradients, strict=True):
        if name == "dx" and not need_dx:
            assert g is None
        else:
            cases.assert_close(ops.to_host(g), e, tolerance, f"{block}, {name}")
    y, kept = block_forward(*arrays, **options(block), training=False)
    assert kept is None
    cases.assert_close(ops.to_host(y), expected, tolerance, f"{block}, y of a test pass")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_convolution_blocks(fp32: ModuleType, order: str, block: Block) -> None:
    check(fp32, block, 2e-5)


def test_without_the_gradient_of_the_input(fp32: ModuleType) -> None:
    check(fp32, BLOCKS[1], 2e-5, need_dx=False)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_convolution_blocks_in_bfloat16(backend: Callable[[str], ModuleType], block: Block) -> None:
    """Against the composition with the rounding where the backend has it: operands, the raw result, the output."""
    ops = backend("bf16")
    x, w, b, dy = draw(block)
    x, w, dy = round_to_bf16(x), round_to_bf16(w), round_to_bf16(dy)
    zero = np.zeros_like(b)
    raw = reference.conv2d_forward(x, w, zero, stride=block.stride, pad=block.pad, groups=block.groups)
    a = round_to_bf16(raw) + b
    a = a if block.relu_last else reference.relu_forward(a)
    expected, kept = _after(block, a)
    arrays = [ops.asarray(v) for v in (x, w, b)]
    block_forward, block_backward = operations(ops, block)
    y, device_kept = block_forward(*arrays, **options(block), training=True)
    assert y.dtype == np.uint16
    # A sum that lies next to a rounding boundary may fall on either side of it: one step of bfloat16.
    cases.assert_close(ops.to_host(y), expected, 2.0**-7)
    got = block_backward(ops.asarray(dy), device_kept, arrays[1], **options(block), need_dx=True)
    assert got[0].dtype == np.uint16
    assert got[1].dtype == got[2].dtype == np.float32
    for g, e in zip(got, backward(block, dy, kept, x, w), strict=True):
        error = np.linalg.norm(ops.to_host(g) - e) / np.linalg.norm(e)
        assert error < 2.0**-5, error


def _after(block: Block, a: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    identity = np.eye(block.maps, dtype=np.float32).reshape(1, 1, block.maps, block.maps)
    plain = replace(block, name="identity", x=a.shape, kernel=(1, 1), stride=1, pad=0, groups=1)
    return forward(plain, a, identity, np.zeros(block.maps, np.float32))


def test_ties_go_to_the_first_place_and_nan_wins(fp32: ModuleType) -> None:
    x = np.zeros((1, 5, 7, 4), np.float32)
    x[0, :, :, 1] = np.arange(35).reshape(5, 7) // 9
    x[0, 1, 2, 2] = np.nan
    w, b = np.eye(4, dtype=np.float32).reshape(1, 1, 4, 4), np.zeros(4, np.float32)
    arrays = [fp32.asarray(a) for a in (x, w, b)]
    geometry = {"stride": 1, "pad": 0, "groups": 1, "lrn": None, "pool": (3, 2)}
    y, kept = fp32.conv_block_forward(*arrays, **geometry, training=True)
    _, winner = reference.maxpool_forward(np.where(np.isnan(fp32.to_host(kept.result)), np.nan, x), size=3, stride=2)
    # A NaN in one channel spreads to all maps of its pixel, in a product; the window's first NaN wins there.
    expected = np.where(np.isnan(x).any(axis=3, keepdims=True), np.nan, x)
    want, winner = reference.maxpool_forward(expected, size=3, stride=2)
    np.testing.assert_array_equal(fp32.to_host(y), want)
    np.testing.assert_array_equal(fp32.to_host(kept.winner), winner)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_fully_connected_block(backend: Callable[[str], ModuleType], precision: str) -> None:
    ops = backend(precision)
    random = cases.random_for("linear block")
    tolerance = {"fp32": 1e-5, "tf32": 2.0**-7 if REAL else 2.0**-9, "bf16": 2.0**-6}[precision]
    for n, d, k in ((3, 37, 11), (1, 12, 8), (5, 64, 1100), (2, 9, 4100), (130, 8, 4)):
        x, w, b, dy = (random.standard_normal(s, dtype=np.float32) for s in ((n, d), (d, k), (k,), (n, k)))
        y = reference.relu_forward(reference.linear_forward(x, w, b))
        arrays = [ops.asarray(a) for a in (x, w, b)]
        got, kept = ops.linear_block_forward(*arrays, training=True)
        cases.assert_close(ops.to_host(got), y, tolerance)
        on = ops.to_host(got)  # the gradient of the very mask, whatever rounding decided
        expected = reference.linear_backward(reference.relu_backward(dy, on), x, w, need_dx=True)
        gradients = ops.linear_block_backward(ops.asarray(dy), kept, arrays[1], need_dx=True)
        for g, e in zip(gradients, expected, strict=True):
            cases.assert_close(ops.to_host(g), e, tolerance)
        assert ops.linear_block_backward(ops.asarray(dy), kept, arrays[1], need_dx=False)[0] is None
        assert ops.linear_block_forward(*arrays, training=False)[1] is None


@pytest.mark.parametrize("block", [BLOCKS[1], BLOCKS[2], BLOCKS[13]], ids=str)
def test_a_batch_in_pieces_gives_the_same(fp32: ModuleType, monkeypatch: pytest.MonkeyPatch, block: Block) -> None:
    monkeypatch.setattr(convolution.ConvShape, "images_at_once", lambda self, memory, itemsize: 1)
    check(fp32, block, 2e-5)


def test_the_tile_of_a_pooling_block_fits_shared_memory() -> None:
    for out, channels in ((27, 96), (13, 256), (6, 256), (1, 1024), (3, 5)):
        rows, columns = blocks.tile(out, out, 3, 2, channels)
        pixels = (2 * rows + 1) * (2 * columns + 1)
        assert 1 <= rows <= out
        assert 1 <= columns <= out
        assert pixels * channels * 4 <= max(blocks.TILE_MEMORY, 9 * channels * 4)


def test_db_is_the_same_bits_whatever_the_order(fp32: ModuleType, pretended: standin.Machine) -> None:
    from tests.gpu.shim import build

    found = set()
    for order in build.ORDERS:
        build.settings.order = order
        x, w, b, dy = draw(BLOCKS[0])
        arrays = [fp32.asarray(a) for a in (x, w, b)]
        _, kept = fp32.conv_block_forward(*arrays, **options(BLOCKS[0]), training=True)
        gradients = fp32.conv_block_backward(fp32.asarray(dy), kept, arrays[1], **options(BLOCKS[0]), need_dx=False)
        found.add(fp32.to_host(gradients[2]).tobytes())
    assert len(found) == 1
