"""Max pooling, overlapping where stride < size.

::

    y[n, r, c, a]  = max_{i, j < size} x[n, r stride + i, c stride + j, a]       winner = i size + j, first maximum
    dx[n, r stride + i, c stride + j, a] += dy[n, r, c, a]                       for the winner (i, j)

Both passes run over the channels in the innermost loop, with a selection in place of a branch, so that eight channels
go through at a time. The backward pass goes through the rows of dx, each of which lies under at most two rows of
windows (3/2), and stays in the first-level cache: every place of a window takes dy where it won, and 0 elsewhere.
Following the winners instead would move one number at a time.

Gain: NumPy 54 ms, compiled windows 9.0, these selections 3.2 (conv1's output of 16 images, `python -m bench.kernels
pool`, docs/cpu.md).
"""

from __future__ import annotations

import numpy as np

from net.cpu.jit import inner, kernel, prange
from net.cpu.memory import contiguous, empty
from net.shapes import require_shape, windows


def maxpool_forward(x: np.ndarray, *, size: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """x (N, H, W, C) -> y (N, OH, OW, C), winner uint8 of the same shape; keep winner and x's height and width."""
    x = contiguous(x)
    n, height, width, channels = x.shape
    shape = (n, windows(height, size, stride), windows(width, size, stride), channels)
    y, winner = empty(shape), empty(shape, np.uint8)
    _forward(x, y, winner, size, stride)
    return y, winner


def maxpool_backward(
    dy: np.ndarray, winner: np.ndarray, *, height: int, width: int, size: int, stride: int
) -> np.ndarray:
    """dy, winner (N, OH, OW, C) -> dx (N, height, width, C)."""
    dy, winner = contiguous(dy), contiguous(winner, np.uint8)
    n, _, _, channels = dy.shape
    for name, array in (("dy", dy), ("winner", winner)):
        require_shape(name, array, (n, windows(height, size, stride), windows(width, size, stride), channels))
    dx = empty((n, height, width, channels))
    _backward(dy, winner, dx, size, stride)
    return dx


@inner
def pool_row(
    rows: np.ndarray, top: int, size: int, stride: int, best: np.ndarray, y: np.ndarray, winner: np.ndarray
) -> None:
    """A row of windows: maxima y and winners (OW, C) from ``size`` rows of x. ``best`` int32 (C,) is scratch.

    ``rows`` (R, W, C) is the whole picture or a ring of its last rows: row ``top + i`` is at ``(top + i) % R``.
    """
    ow, channels = y.shape
    if size == 3:  # AlexNet's windows, written out so that maximum and place stay in registers
        upper, middle, lower = rows[top % len(rows)], rows[(top + 1) % len(rows)], rows[(top + 2) % len(rows)]
        for c in range(ow):
            left = c * stride
            for a in range(channels):
                m, place = upper[left, a], np.int32(0)
                m, place = _larger(m, place, upper[left + 1, a], np.int32(1))
                m, place = _larger(m, place, upper[left + 2, a], np.int32(2))
                m, place = _larger(m, place, middle[left, a], np.int32(3))
                m, place = _larger(m, place, middle[left + 1, a], np.int32(4))
                m, place = _larger(m, place, middle[left + 2, a], np.int32(5))
                m, place = _larger(m, place, lower[left, a], np.int32(6))
                m, place = _larger(m, place, lower[left + 1, a], np.int32(7))
                m, place = _larger(m, place, lower[left + 2, a], np.int32(8))
                y[c, a] = m
                winner[c, a] = place
        return
    for c in range(ow):
        for i in range(size):
            row = (top + i) % len(rows)
            for j in range(size):
                left = c * stride + j
                if i == 0 and j == 0:
                    for a in range(channels):
                        y[c, a], best[a] = rows[row, left, a], 0
                else:
                    for a in range(channels):
                        y[c, a], best[a] = _larger(y[c, a], best[a], rows[row, left, a], np.int32(i * size + j))
        for a in range(channels):
            winner[c, a] = best[a]


@inner
def _larger(m: np.float32, place: np.int32, v: np.float32, at: np.int32) -> tuple[np.float32, np.int32]:
    """A value takes over where it is larger, or NaN while the best so far is not: ``not (v <= m)`` says both."""
    better = (not (v <= m)) & (m == m)
    return (v if better else m), (at if better else place)


@inner
def unpool_row(dy: np.ndarray, winner: np.ndarray, row: int, size: int, stride: int, dx: np.ndarray) -> None:
    """Row ``row`` of an image's dx (W, C) from its dy and winners (OH, OW, C)."""
    oh, ow, channels = dy.shape
    dx[:] = 0
    for r in range(max(0, (row - size) // stride + 1), min(oh, row // stride + 1)):
        for c in range(ow):
            for j in range(size):
                place = np.uint8((row - r * stride) * size + j)
                column = c * stride + j
                for a in range(channels):
                    dx[column, a] += dy[r, c, a] if winner[r, c, a] == place else np.float32(0)


@kernel
def _forward(x: np.ndarray, y: np.ndarray, winner: np.ndarray, size: int, stride: int) -> None:
    images, oh, _, channels = y.shape
    for task in prange(images * oh):
        n, r = task // oh, task % oh
        pool_row(x[n], r * stride, size, stride, np.empty(channels, np.int32), y[n, r], winner[n, r])


@kernel
def _backward(dy: np.ndarray, winner: np.ndarray, dx: np.ndarray, size: int, stride: int) -> None:
    images, height = dx.shape[:2]
    for task in prange(images * height):
        n, row = task // height, task % height
        unpool_row(dy[n], winner[n], row, size, stride, dx[n, row])
