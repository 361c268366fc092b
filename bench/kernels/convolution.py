"""conv3's forward pass: 3x3 over 256 channels to 384 maps, 13 x 13 pixels."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from numba import prange

import net.cpu
from bench.kernels.exhibit import Exhibit, Step
from net import reference
from net.cpu import im2col


@numba.njit(cache=True)
def _loops(x: np.ndarray, w: np.ndarray, y: np.ndarray) -> None:
    """The formula as it stands: one number of y after the other. Each of its terms is far from the next in w."""
    n, height, width, channels = x.shape
    for image in range(n):
        for r in range(height):
            for c in range(width):
                for o in range(y.shape[3]):
                    total = np.float32(0)
                    for i in range(3):
                        for j in range(3):
                            p, q = r + i - 1, c + j - 1
                            if 0 <= p < height and 0 <= q < width:
                                for a in range(channels):
                                    total += x[image, p, q, a] * w[i, j, a, o]
                    y[image, r, c, o] = total


@numba.njit(cache=True, parallel=True, fastmath={"contract"}, error_model="numpy")
def _reordered(x: np.ndarray, w: np.ndarray, y: np.ndarray) -> None:
    """Maps innermost: eight or sixteen of them in one instruction, and w is read in the order it lies in."""
    n, height, width, channels = x.shape
    maps = y.shape[3]
    for row in prange(n * height):
        image, r = row // height, row % height
        for c in range(width):
            total = np.zeros(maps, np.float32)
            for i in range(3):
                for j in range(3):
                    p, q = r + i - 1, c + j - 1
                    if 0 <= p < height and 0 <= q < width:
                        for a in range(channels):
                            v = x[image, p, q, a]
                            for o in range(maps):
                                total[o] += v * w[i, j, a, o]
            for o in range(maps):
                y[image, r, c, o] = total[o]


def exhibit(images: int) -> Exhibit:
    random = np.random.default_rng(3)
    x = random.standard_normal((images, 13, 13, 256), dtype=np.float32)
    w = random.standard_normal((3, 3, 256, 384), dtype=np.float32) * np.float32(0.03)
    b, y = np.zeros(384, np.float32), np.empty((images, 13, 13, 384), np.float32)
    geometry = {"stride": 1, "pad": 1, "groups": 1}
    wide = [a.astype(np.float64) for a in (x, w, b)]

    def filled(kernel: Callable[..., None]) -> np.ndarray:
        kernel(x, w, y)
        return y

    def columns() -> np.ndarray:
        im2col.forward(x, w, y, 1, 1, 1)
        return y

    return Exhibit(
        f"convolution, conv3, {images} images",
        reference.conv2d_forward(*wide, **geometry),
        (
            Step("loops", "the formula, compiled", lambda: filled(_loops)),
            Step("loops reordered", "maps innermost: vector instructions; all cores", lambda: filled(_reordered)),
            Step(
                "reference",
                "a BLAS product for each of the 9 taps",
                lambda: reference.conv2d_forward(x, w, b, **geometry),
            ),
            Step("im2col + BLAS", "one long product on columns made in the cache", columns),
            Step("Winograd F(4,3)", "36 multiplications for 144", lambda: net.cpu.conv2d_forward(x, w, b, **geometry)),
        ),
        2e-5,
    )
