"""What follows conv1: bias, ReLU, LRN and a 3x3/2 max pool over 55 x 55 x 96."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

import net.cpu
from bench.kernels.exhibit import Exhibit, Step
from net import reference
from net.cpu import finish

LRN = {"size": 5, "k": 2.0, "alpha": 1e-4, "beta": 0.75}


def _window_sums(squares: np.ndarray) -> np.ndarray:
    """Sums over five neighbouring channels."""
    sums = squares.copy()
    for offset in (1, 2):
        sums[..., offset:] += squares[..., :-offset]
        sums[..., :-offset] += squares[..., offset:]
    return sums


def _numpy(x: np.ndarray, bias: np.ndarray, power: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    y = np.maximum(x + bias, 0)
    s = np.float32(2) + np.float32(1e-4) * _window_sums(y * y)
    z = y * power(s)
    rows, columns = (z.shape[1] - 3) // 2 + 1, (z.shape[2] - 3) // 2 + 1
    views = [z[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] for i in range(3) for j in range(3)]
    return np.maximum.reduce(views)


def _inverse(s: np.ndarray) -> np.ndarray:
    root = np.sqrt(s)
    return 1 / (root * np.sqrt(root))


def exhibit(images: int) -> Exhibit:
    random = np.random.default_rng(1)
    x = random.standard_normal((images, 55, 55, 96), dtype=np.float32) * np.float32(20)
    bias = random.standard_normal(96, dtype=np.float32)
    wide, wide_bias = x.astype(np.float64), bias.astype(np.float64)
    normal, _ = reference.lrn_forward(np.maximum(wide + wide_bias, 0), **LRN)
    oracle, _ = reference.maxpool_forward(normal, size=3, stride=2)
    block = finish.block(tuple(LRN.values()), (3, 2))

    def separate() -> np.ndarray:
        y = net.cpu.relu_forward(x + bias)
        z, _ = net.cpu.lrn_forward(y, **LRN)
        return net.cpu.maxpool_forward(z, size=3, stride=2)[0]

    def fused() -> np.ndarray:
        to = finish.results(x.shape, block, keep=True)
        finish.finish_all(x, bias, block, to, numba.get_num_threads())
        return to.out

    return Exhibit(
        f"bias + ReLU + LRN + pool, conv1, {images} images",
        oracle,
        (
            Step("NumPy, power", "s ** -0.75 as written", lambda: _numpy(x, bias, lambda s: s ** np.float32(-0.75))),
            Step("NumPy, square roots", "1 / (r sqrt(r)), r = sqrt(s)", lambda: _numpy(x, bias, _inverse)),
            Step("a kernel each", "one pass over memory for each operation; all cores", separate),
            Step("one pass", "rows stay in the cache from the bias to the pool", fused),
        ),
        1e-5,
    )
