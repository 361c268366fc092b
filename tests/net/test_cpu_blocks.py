"""The CPU backend's fused operations against the same composition in the reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numba
import numpy as np
import pytest

import net.cpu
from net import reference
from net.cpu import memory
from tests.net import cases


@dataclass(frozen=True)
class Options:
    stride: int = 1
    pad: int = 0
    groups: int = 1
    lrn: tuple[int, float, float, float] | None = None
    pool: tuple[int, int] | None = None


FIVE = (5, 2.0, 1.0, 0.75)
#  name                              x                kernel   maps
BLOCKS = {
    "all of it, conv1": ((2, 63, 51, 3), (11, 11), 96, Options(4, lrn=(5, 2.0, 1e-4, 0.75), pool=(3, 2))),
    "all of it, conv2": ((3, 27, 27, 96), (5, 5), 256, Options(1, 2, 2, lrn=FIVE, pool=(3, 2))),
    "seven images in mosaics": ((7, 13, 13, 24), (3, 3), 40, Options(1, 1, 2, lrn=FIVE, pool=(3, 2))),
    "height and width, window of 4": ((5, 8, 15, 6), (3, 3), 16, Options(1, 1, lrn=(4, 2.0, 1.0, 0.75), pool=(3, 2))),
    "no padding": ((3, 11, 9, 5), (3, 3), 7, Options(lrn=FIVE, pool=(3, 2))),
    "full padding": ((2, 6, 5, 4), (3, 3), 6, Options(1, 2, lrn=FIVE)),
    "padding beyond the filter": ((2, 5, 6, 4), (3, 3), 6, Options(1, 3)),
    "window of 9, beta 0.5": ((2, 7, 6, 3), (3, 3), 12, Options(lrn=(9, 1.0, 0.5, 0.5), pool=(2, 2))),
    "without transforms": ((3, 8, 9, 5), (3, 2), 7, Options(lrn=FIVE, pool=(3, 2))),
    "without transforms, strided groups": ((2, 9, 8, 4), (3, 3), 6, Options(2, 1, 2, pool=(3, 1))),
    "one map, one image": ((1, 6, 5, 1), (3, 3), 1, Options(lrn=FIVE, pool=(3, 2))),
    "LRN alone": ((2, 9, 7, 3), (3, 3), 24, Options(lrn=FIVE)),
    "pool alone, conv5": ((5, 13, 13, 12), (3, 3), 32, Options(1, 1, 2, pool=(3, 2))),
    "pool with gaps": ((2, 12, 11, 3), (3, 3), 8, Options(pool=(2, 3))),
    "pool without overlap": ((2, 11, 8, 3), (3, 3), 8, Options(lrn=FIVE, pool=(3, 3))),
    "pool larger than its stride by three": ((2, 12, 11, 3), (5, 5), 8, Options(1, 2, lrn=FIVE, pool=(4, 1))),
    "neither": ((2, 6, 7, 8), (3, 3), 12, Options(1, 1, 2)),
    "more images than a mosaic holds": ((21, 5, 6, 4), (3, 3), 5, Options(1, 1)),
}


def _composition(x: np.ndarray, w: np.ndarray, b: np.ndarray, options: Options) -> tuple[np.ndarray, tuple]:
    geometry = {"stride": options.stride, "pad": options.pad, "groups": options.groups}
    a = reference.relu_forward(reference.conv2d_forward(x, w, b, **geometry))
    y, s, winner = a, None, None
    if options.lrn:
        y, s = reference.lrn_forward(y, **dict(zip(("size", "k", "alpha", "beta"), options.lrn, strict=True)))
    if options.pool:
        y, winner = reference.maxpool_forward(y, size=options.pool[0], stride=options.pool[1])
    return y, (a, s, winner)


def _composition_backward(dy: np.ndarray, kept: tuple, x: np.ndarray, w: np.ndarray, options: Options) -> tuple:
    a, s, winner = kept
    if options.pool:
        size, stride = options.pool
        sides = {"height": a.shape[1], "width": a.shape[2]}
        dy = reference.maxpool_backward(dy, winner, **sides, size=size, stride=stride)
    if options.lrn:
        size, _, alpha, beta = options.lrn
        dy = reference.lrn_backward(dy, a, s, size=size, alpha=alpha, beta=beta)
    dy = reference.relu_backward(dy, a)
    geometry = {"stride": options.stride, "pad": options.pad, "groups": options.groups}
    return reference.conv2d_backward(dy, x, w, **geometry, need_dx=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_convolution_blocks(name: str) -> None:
    shape, kernel, maps, options = BLOCKS[name]
    random = cases.random_for(name)
    wide = [
        random.standard_normal(shape),
        random.standard_normal((*kernel, shape[3] // options.groups, maps))
        / np.sqrt(np.prod(kernel) * shape[3] / options.groups),
        random.standard_normal(maps),
    ]
    wide = [a.astype(np.float32).astype(np.float64) for a in wide]
    expected, kept = _composition(*wide, options)
    dy = random.standard_normal(expected.shape).astype(np.float32)
    gradients = _composition_backward(dy.astype(np.float64), kept, wide[0], wide[1], options)

    x, w, b = (net.cpu.asarray(a.astype(np.float32)) for a in wide)
    for _ in range(2):  # the second time in used memory
        y, kept = net.cpu.conv_block_forward(x, w, b, **asdict(options), training=True)
        cases.assert_close(y, expected, 2e-5, "y")
        got = net.cpu.conv_block_backward(net.cpu.asarray(dy), kept, w, **asdict(options), need_dx=True)
        for which, g, e in zip(("dx", "dw", "db"), got, gradients, strict=True):
            cases.assert_close(g, e, 2e-5, which)
        _, kept = net.cpu.conv_block_forward(x, w, b, **asdict(options), training=True)  # the first is used up
        without = net.cpu.conv_block_backward(net.cpu.asarray(dy), kept, w, **asdict(options), need_dx=False)
        assert without[0] is None
        np.testing.assert_array_equal(without[1], got[1])
        test_pass, kept = net.cpu.conv_block_forward(x, w, b, **asdict(options), training=False)
        assert kept is None
        np.testing.assert_array_equal(test_pass, y)


@pytest.mark.parametrize(("images", "depth", "maps"), [(1, 5, 3), (4, 1030, 33), (7, 97, 48), (35, 300, 1)])
def test_fully_connected_blocks(images: int, depth: int, maps: int) -> None:
    random = cases.random_for(f"linear block {images} {depth} {maps}")
    sizes = ((images, depth), (depth, maps), (maps,), (images, maps))
    x, w, b, dy = (random.standard_normal(size, dtype=np.float32) for size in sizes)
    wide = [a.astype(np.float64) for a in (x, w, b, dy)]
    expected = reference.relu_forward(reference.linear_forward(*wide[:3]))
    gradients = reference.linear_backward(reference.relu_backward(wide[3], expected), *wide[:2], need_dx=True)
    for training in (True, False):
        y, _ = net.cpu.linear_block_forward(x, w, b, training=training)
        cases.assert_close(y, expected, 1e-5, "y")
    _, kept = net.cpu.linear_block_forward(x, w, b, training=True)
    got = net.cpu.linear_block_backward(dy, kept, w, need_dx=True)
    for which, g, e in zip(("dx", "dw", "db"), got, gradients, strict=True):
        cases.assert_close(net.cpu.to_host(g), e, 1e-5, which)
    assert net.cpu.linear_block_backward(dy, kept, w, need_dx=False)[0] is None


def test_nan_passes_and_ties_go_to_the_first_place() -> None:
    x = np.zeros((1, 7, 9, 4), np.float32)
    x[0, :, :, 1] = np.arange(63).reshape(7, 9) // 9
    x[0, 1, 2, 2] = np.nan
    w, b = np.eye(4, dtype=np.float32).reshape(1, 1, 4, 4), np.zeros(4, np.float32)
    options = {"stride": 1, "pad": 0, "groups": 1, "lrn": None, "pool": (3, 2)}
    y, (_, kept, winner) = net.cpu.conv_block_forward(x, w, b, **options, training=True)
    # In a product a NaN in one channel spreads to all maps of its pixel; the first of a window's NaNs wins there.
    spread = np.where(np.isnan(x).any(axis=3, keepdims=True), np.nan, x)
    np.testing.assert_array_equal(kept, spread)
    expected, expected_winner = reference.maxpool_forward(spread, size=3, stride=2)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(winner, expected_winner)


def test_a_test_pass_on_few_images_and_many_cores() -> None:
    """With fewer rows of scratch memory than images, no two cores may share one."""
    shape, kernel, maps, options = BLOCKS["no padding"]
    random = cases.random_for("cores")
    x = random.standard_normal((2 * numba.get_num_threads() + 1, *shape[1:]), dtype=np.float32)
    w, b = random.standard_normal((*kernel, shape[3], maps), dtype=np.float32), np.zeros(maps, np.float32)
    expected, _ = net.cpu.conv_block_forward(x, w, b, **asdict(options), training=True)
    for _ in range(20):
        y, _ = net.cpu.conv_block_forward(x, w, b, **asdict(options), training=False)
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    "name", ["all of it, conv1", "all of it, conv2", "seven images in mosaics", "without transforms"]
)
def test_the_same_input_gives_the_same_output_whatever_memory_held(name: str) -> None:
    """No task may read what it has not written, or write where another one works."""
    shape, kernel, maps, options = BLOCKS[name]
    random = cases.random_for("again " + name)
    x = random.standard_normal((7, *shape[1:]), dtype=np.float32)
    w = random.standard_normal((*kernel, shape[3] // options.groups, maps), dtype=np.float32)
    b, first, dy = np.zeros(maps, np.float32), None, None
    for number in range(12):
        memory.poison(np.float32(np.nan) if number % 2 else np.float32(1e30))
        y, kept = net.cpu.conv_block_forward(x, w, b, **asdict(options), training=True)
        dy = random.standard_normal(y.shape, dtype=np.float32) if dy is None else dy
        results = [
            y,
            *(a.copy() for a in kept[1:]),
            *net.cpu.conv_block_backward(dy, kept, w, **asdict(options), need_dx=True),
        ]
        results.append(net.cpu.conv_block_forward(x, w, b, **asdict(options), training=False)[0])
        if first is None:
            first = [a.copy() for a in results]
        for a, expected in zip(results, first, strict=True):
            np.testing.assert_array_equal(a, expected)
