"""Max pooling, overlapping where stride < size (paper, section 3.4: size 3, stride 2).

Shapes
    x (N, H, W, C) and y (N, OH, OW, C) float32 (float64 in checks), winner (N, OH, OW, C) uint8, with
    ``OH = (H - size) // stride + 1`` and OW likewise. No padding; rows and columns left over at the end are not
    looked at.

Forward
    ``y[n, r, c, a] = max_{i, j < size} x[n, r stride + i, c stride + j, a]``

    ``winner`` is the place of the maximum inside its window, i size + j, as uint8. Of equal maxima the first in that
    order wins. NaN counts as larger than everything, so it is not lost; of several the first wins.

Backward
    y is one of the window's inputs and does not depend on the others, so the whole dy goes to the winner. Windows
    overlap, and a pixel that wins several of them collects the dy of each::

        dx[n, r stride + i, c stride + j, a] += dy[n, r, c, a]   for the winner (i, j) of (n, r, c, a)

    Going through the window's places one after the other, each (r, c) adds to a pixel of its own, which NumPy
    does in one statement.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def maxpool_forward(x: np.ndarray, *, size: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """x (N, H, W, C) -> y (N, OH, OW, C), winner uint8 of the same shape; keep winner and x's height and width."""
    windows = sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    candidates = windows.reshape(*windows.shape[:4], size * size)
    winner = candidates.argmax(axis=-1)  # the first maximum, and NaN before all, is what NumPy returns
    y = np.take_along_axis(candidates, winner[..., np.newaxis], axis=-1)[..., 0]
    return y, winner.astype(np.uint8)


def maxpool_backward(
    dy: np.ndarray, winner: np.ndarray, *, height: int, width: int, size: int, stride: int
) -> np.ndarray:
    """dy, winner (N, OH, OW, C) -> dx (N, height, width, C)."""
    n, oh, ow, channels = dy.shape
    dx = np.zeros((n, height, width, channels), dtype=dy.dtype)
    for i in range(size):
        for j in range(size):
            rows = slice(i, i + stride * (oh - 1) + 1, stride)
            columns = slice(j, j + stride * (ow - 1) + 1, stride)
            dx[:, rows, columns] += np.where(winner == i * size + j, dy, 0)
    return dx
