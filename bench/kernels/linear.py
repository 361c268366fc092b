"""fc7's forward pass, 4096 inputs to 4096 units with bias and ReLU: for a batch, and for one picture."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from numba import prange

import net.cpu
from bench.kernels.exhibit import Exhibit, Step


@numba.njit(cache=True)
def _loops(x: np.ndarray, w: np.ndarray, b: np.ndarray, y: np.ndarray) -> None:
    """The formula as it stands: each number of y goes down a column of w, 16 KB from one element to the next."""
    for n in range(x.shape[0]):
        for o in range(w.shape[1]):
            total = b[o]
            for k in range(w.shape[0]):
                total += x[n, k] * w[k, o]
            y[n, o] = max(total, np.float32(0))


@numba.njit(cache=True, parallel=True, fastmath={"contract"}, error_model="numpy")
def _rows(x: np.ndarray, w: np.ndarray, b: np.ndarray, y: np.ndarray) -> None:
    """Units innermost: rows of w as they lie, one picture after the other, so that w is read once for each."""
    for n in prange(x.shape[0]):
        total = b.copy()
        for k in range(w.shape[0]):
            v, row = x[n, k], w[k]
            for o in range(w.shape[1]):
                total[o] += v * row[o]
        for o in range(w.shape[1]):
            y[n, o] = max(total[o], np.float32(0))


@numba.njit(cache=True, parallel=True, fastmath={"contract"}, error_model="numpy")
def _once(x: np.ndarray, w: np.ndarray, b: np.ndarray, y: np.ndarray) -> None:
    """Every row of w is used for all pictures while it is in the cache; cores take strips of 256 units."""
    for strip in prange((w.shape[1] + 255) // 256):
        first, last = strip * 256, min(strip * 256 + 256, w.shape[1])
        total = np.zeros((x.shape[0], 256), np.float32)
        for k in range(w.shape[0]):
            row = w[k, first:last]
            for n in range(x.shape[0]):
                v = x[n, k]
                for o in range(last - first):
                    total[n, o] += v * row[o]
        for n in range(x.shape[0]):
            for o in range(last - first):
                y[n, first + o] = max(total[n, o] + b[first + o], np.float32(0))


def exhibit(images: int, units: int) -> Exhibit:
    random = np.random.default_rng(11)
    x = np.maximum(random.standard_normal((images, units), dtype=np.float32), 0)
    w = random.standard_normal((units, units), dtype=np.float32) * np.float32(0.02)
    b, y = random.standard_normal(units, dtype=np.float32), np.empty((images, units), np.float32)
    oracle = np.maximum(x.astype(np.float64) @ w.astype(np.float64) + b, 0)

    def filled(kernel: Callable[..., None]) -> np.ndarray:
        kernel(x, w, b, y)
        return y

    def blas() -> np.ndarray:
        np.matmul(x, w, out=y)
        np.add(y, b, out=y)
        np.maximum(y, 0, out=y)
        return y

    def ours() -> np.ndarray:
        return net.cpu.linear_block_forward(x, w, b, training=False)[0]

    if images == 1:
        last = Step("parts", "each core reads a few hundred whole rows of w, four at a time", ours)
    else:
        last = Step("panels", "w packed once into panels beside a micro-kernel with its sums in registers", ours)
    return Exhibit(
        f"fully connected + ReLU, fc7, {images} {'image' if images == 1 else 'images'}",
        oracle,
        (
            Step("loops", "the formula, compiled", lambda: filled(_loops)),
            Step(
                "rows", "units innermost: vector instructions, w in its order; a core a picture", lambda: filled(_rows)
            ),
            Step("each row once", "a row of w serves all pictures while it is in the cache", lambda: filled(_once)),
            Step("BLAS", "NumPy's product, then bias and ReLU", blas),
            last,
        ),
        2e-5,
    )
