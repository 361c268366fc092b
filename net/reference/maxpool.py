"""Max pooling, overlapping where stride < size (paper, section 3.4: size 3, stride 2).

Shapes
    x (N, H, W, C) and y (N, OH, OW, C) float32 (float64 in checks), winner (N, OH, OW, C) uint8, with
    ``OH = (H - size) // stride + 1`` and OW likewise. No padding; rows and columns left over at the end are not
    looked at.

Forward
    For image n, output pixel (r, c) and channel a:
    ``y[n, r, c, a] = max_{i, j < size} x[n, r stride + i, c stride + j, a]``

    ``winner`` is the place of the maximum inside its window, i size + j. It is all that the backward pass has to know,
    so x need not be kept; one byte is enough for a size of up to 16. Of equal maxima the first in that order wins. NaN
    counts as larger than everything, so it is not lost; of several the first wins.

Backward
    y is one of the window's inputs: ∂y/∂x is 1 for the winner and 0 for the others, which could change a little without
    y noticing. So the whole dy goes to the winner. Windows overlap, and a pixel that wins several collects the dy of
    each::

        dx[n, r stride + i, c stride + j, a] += dy[n, r, c, a]   for the winner (i, j) of (n, r, c, a)

    For one place (i, j) in the window, different (r, c) are different pixels, so NumPy can add all of them in one
    statement: size² statements in all.

Example
    Two windows of 2 x 2 that overlap; the 5 wins both, at place 1 (upper right) of the first and 0 of the second.

    >>> x = np.array([[1.0, 5.0, 2.0], [3.0, 4.0, 0.0]]).reshape(1, 2, 3, 1)
    >>> y, winner = maxpool_forward(x, size=2, stride=1)
    >>> y.ravel(), winner.ravel()
    (array([5., 5.]), array([1, 0], dtype=uint8))
    >>> dy = np.array([10.0, 100.0]).reshape(1, 1, 2, 1)
    >>> maxpool_backward(dy, winner, height=2, width=3, size=2, stride=1)[0, :, :, 0]
    array([[  0., 110.,   0.],
           [  0.,   0.,   0.]])
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
