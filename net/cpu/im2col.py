"""Convolution as a matrix product: the pixels under each kernel position, laid out as a row ("im2col").

::

    y[n, r, c, o]    = b[o] + sum_{i, j, a} p[n, r stride + i, c stride + j, a] w[i, j, a, o]      p: x with its padding
    dw[i, j, a, o]   = sum_{n, r, c} p[n, r stride + i, c stride + j, a] dy[n, r, c, o]
    dp[n, r stride + i, c stride + j, a] += sum_o dy[n, r, c, o] w[i, j, a, o]

Let X be the matrix with a row for each output pixel (n, r, c) and a column for each (i, j, a), W the weights and Y the
output as matrices: X is N OH OW x KH KW Cin, W is KH KW Cin x Cout, Y is N OH OW x Cout (Cin and Cout of one group).
Then Y = X W, dW = Xᵀ dY, and dX = dY Wᵀ, whose entries are added to the pixels they were copied from ("col2im"). conv1,
for one image: 3,025 x 363 times 363 x 96.

With a stride of 1, X repeats each pixel up to KH KW times, so it is made for a few images at a time (``_SLAB``).
Correct for every shape, stride, padding and number of groups: what ``net/cpu/plan.py`` falls back on.

Gain: conv3 of 16 images in compiled loops 81 ms, this way 31 (`python -m bench.kernels convolution`, docs/cpu.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from net.cpu.jit import kernel, prange
from net.cpu.memory import empty

_SLAB: Final = 8 << 20  # bytes of columns at a time


def forward(x: np.ndarray, w: np.ndarray, y: np.ndarray, stride: int, pad: int, groups: int) -> None:
    """x (N, H, W, Cin), w (KH, KW, Cin / groups, Cout) -> y (N, OH, OW, Cout), without the bias."""
    for images, columns, ins, outs in _slabs(x, w, y, groups):
        _im2col(x[images], columns, w.shape[0], w.shape[1], y.shape[2], stride, pad, ins.start)
        np.matmul(columns, _matrix(w, outs), out=_rows(y[images])[:, outs])


def backward_weights(dy: np.ndarray, x: np.ndarray, dw: np.ndarray, stride: int, pad: int, groups: int) -> None:
    """dy, x -> dw."""
    matrix = dw.reshape(-1, dw.shape[3])
    part = empty((matrix.shape[0], matrix.shape[1] // groups))
    matrix[:] = 0
    for images, columns, ins, outs in _slabs(x, dw, dy, groups):
        _im2col(x[images], columns, dw.shape[0], dw.shape[1], dy.shape[2], stride, pad, ins.start)
        np.matmul(columns.T, _rows(dy[images])[:, outs], out=part)
        matrix[:, outs] += part


def backward_input(dy: np.ndarray, w: np.ndarray, dx: np.ndarray, stride: int, pad: int, groups: int) -> None:
    """dy, w -> dx."""
    for images, columns, ins, outs in _slabs(dx, w, dy, groups):
        np.matmul(_rows(dy[images])[:, outs], _matrix(w, outs).T, out=columns)
        _col2im(
            columns, dx[images], w.shape[0], w.shape[1], dy.shape[1], dy.shape[2], stride, pad, ins.start, w.shape[2]
        )


def _rows(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(-1, pixels.shape[-1])


def _matrix(w: np.ndarray, outs: slice) -> np.ndarray:
    return w.reshape(-1, w.shape[3])[:, outs]


def _slabs(
    x: np.ndarray, w: np.ndarray, y: np.ndarray, groups: int
) -> Iterator[tuple[slice, np.ndarray, slice, slice]]:
    """Images, their columns (not filled), input and output channels, for every slab and group."""
    kh, kw, depth, maps = w.shape
    n, oh, ow, _ = y.shape
    a_row = kh * kw * depth
    at_a_time = max(1, min(n, _SLAB // (4 * a_row * oh * ow)))
    columns = empty((at_a_time * oh * ow, a_row))
    for start in range(0, n, at_a_time):
        images = slice(start, min(n, start + at_a_time))
        for g in range(groups):
            ins, outs = slice(g * depth, (g + 1) * depth), slice(g * maps // groups, (g + 1) * maps // groups)
            yield images, columns[: (images.stop - start) * oh * ow], ins, outs


@kernel
def _im2col(x: np.ndarray, columns: np.ndarray, kh: int, kw: int, ow: int, stride: int, pad: int, channel: int) -> None:
    images, height, width, _ = x.shape
    depth = columns.shape[1] // (kh * kw)
    rows = columns.shape[0] // ow  # of all images
    oh = rows // images
    for task in prange(rows):
        n, r = task // oh, task % oh
        for c in range(ow):
            row = columns[task * ow + c]
            for i in range(kh):
                for j in range(kw):
                    p, q = r * stride + i - pad, c * stride + j - pad
                    at = (i * kw + j) * depth
                    if 0 <= p < height and 0 <= q < width:
                        for a in range(depth):
                            row[at + a] = x[n, p, q, channel + a]
                    else:
                        for a in range(depth):
                            row[at + a] = 0


@kernel
def _col2im(
    columns: np.ndarray,
    dx: np.ndarray,
    kh: int,
    kw: int,
    oh: int,
    ow: int,
    stride: int,
    pad: int,
    channel: int,
    depth: int,
) -> None:
    images, height, width, _ = dx.shape
    for task in prange(images * height):
        n, p = task // height, task % height
        for q in range(width):
            for a in range(depth):
                dx[n, p, q, channel + a] = 0
            for i in range(kh):
                r = p + pad - i
                if r % stride != 0 or r < 0 or r // stride >= oh:
                    continue
                for j in range(kw):
                    c = q + pad - j
                    if c % stride != 0 or c < 0 or c // stride >= ow:
                        continue
                    row = columns[(n * oh + r // stride) * ow + c // stride]
                    at = (i * kw + j) * depth
                    for a in range(depth):
                        dx[n, p, q, channel + a] += row[at + a]
