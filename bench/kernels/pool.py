"""3x3/2 max pooling of conv1's output, with the winners that the backward pass needs."""

from __future__ import annotations

import numba
import numpy as np

import net.cpu
from bench.kernels.exhibit import Exhibit, Step
from net import reference


@numba.njit(cache=True)
def _branches(x: np.ndarray, y: np.ndarray, winner: np.ndarray) -> None:
    """One window after the other, with a branch the processor guesses wrong every few comparisons."""
    for n, r, c, a in np.ndindex(y.shape):
        best, place = x[n, 2 * r, 2 * c, a], 0
        for i in range(3):
            for j in range(3):
                v = x[n, 2 * r + i, 2 * c + j, a]
                if v > best:
                    best, place = v, 3 * i + j
        y[n, r, c, a], winner[n, r, c, a] = best, place


def exhibit(images: int) -> Exhibit:
    x = np.random.default_rng(2).standard_normal((images, 55, 55, 96), dtype=np.float32)
    y, winner = np.empty((images, 27, 27, 96), np.float32), np.empty((images, 27, 27, 96), np.uint8)
    oracle, _ = reference.maxpool_forward(x.astype(np.float64), size=3, stride=2)

    def windows() -> np.ndarray:
        _branches(x, y, winner)
        return y

    return Exhibit(
        f"max pool 3/2 with winners, {images} images",
        oracle,
        (
            Step(
                "reference",
                "NumPy: each window copied into a row, and argmax",
                lambda: reference.maxpool_forward(x, size=3, stride=2)[0],
            ),
            Step("windows, branches", "the formula, compiled", windows),
            Step(
                "selections",
                "channels innermost, no branch; all cores",
                lambda: net.cpu.maxpool_forward(x, size=3, stride=2)[0],
            ),
        ),
        0.0,
    )
