"""Two-dimensional convolution with stride, zero padding and groups (paper, sections 3.2 and 3.5).

Shapes
    x (N, H, W, Cin), w (KH, KW, Cin / groups, Cout), b (Cout,), y (N, OH, OW, Cout) with
    ``OH = (H + 2 pad - KH) // stride + 1`` and OW likewise: the first window begins at row 0 of the padded image, which
    has H + 2 pad rows, and the last one at row H + 2 pad - KH or up to stride - 1 rows before. conv1:
    (227 - 11) // 4 + 1 = 55. All float32, or all float64 in checks.

Forward
    Write p for x with ``pad`` zeros on all four sides; n counts images, (r, c) output pixels, (i, j) places in the
    kernel ("kernel offsets"), a input and o output channels. With one group, for each n, r, c and o::

        y[n, r, c, o] = b[o] + sum_{i < KH} sum_{j < KW} sum_a p[n, r stride + i, c stride + j, a] w[i, j, a, o]

    (strictly a cross-correlation: the kernel is not flipped). For one kernel offset the sum over a is a matrix
    product: the pixels (r stride + i, c stride + j) of all images and all (r, c), one per row, an (N OH OW) x Cin
    matrix, times the Cin x Cout matrix w[i, j]. So a convolution is KH KW matrix products, added up.

Groups
    With ``groups`` = 2 the first half of the output channels sees the first half of the input channels only, the
    second half the second: two independent convolutions side by side. In the paper they ran on two GPUs. ``groups``
    divides Cin and Cout.

Backward
    Everything follows from the sum above, in which each product of a pixel and a weight enters one y: its derivative by
    the weight is the pixel, by the pixel the weight.

    - ``db[o] = sum_{n, r, c} dy[n, r, c, o]``
    - w[i, j, a, o] is multiplied with the pixel at offset (i, j) of every (n, r, c)::

          dw[i, j, a, o] = sum_{n, r, c} p[n, r stride + i, c stride + j, a] dy[n, r, c, o]

      the same rows of pixels as in the forward pass, transposed, times the rows of dy.
    - A pixel of p enters y[n, r, c] for each offset (i, j) at which a window meets it; each adds
      ``dy[n, r, c] w[i, j]ᵀ`` to it. Going through the offsets in the same order::

          dp[n, r stride + i, c stride + j, a] += sum_o dy[n, r, c, o] w[i, j, a, o]

      dx is dp without its border. Pixels that no window meets (those left over at the end) get 0. With a stride of 1
      this is itself a convolution, of dy with the kernels turned by 180 degrees and inputs and outputs exchanged;
      ``net/cpu`` and ``net/gpu`` make use of that.

Example
    One channel, one map, a kernel of nine ones: y adds up windows of 3 x 3 pixels. With dy = 1 everywhere, dx counts
    the windows that meet each pixel.

    >>> x, w, b = np.arange(16.0).reshape(1, 4, 4, 1), np.ones((3, 3, 1, 1)), np.zeros(1)
    >>> y = conv2d_forward(x, w, b, stride=1, pad=0, groups=1)
    >>> y[0, :, :, 0]
    array([[45., 54.],
           [81., 90.]])
    >>> dx, dw, db = conv2d_backward(np.ones_like(y), x, w, stride=1, pad=0, groups=1)
    >>> dx[0, :, :, 0]
    array([[1., 2., 2., 1.],
           [2., 4., 4., 2.],
           [2., 4., 4., 2.],
           [1., 2., 2., 1.]])
    >>> dw[0, 0, 0, 0]  # pixels 0, 1, 4 and 5 met the kernel's first weight
    np.float64(10.0)

    dx as a convolution of dy, with a border of KH - 1 - pad so that each pixel finds all windows it was in:

    >>> w = np.arange(9.0).reshape(3, 3, 1, 1)
    >>> dx, _, _ = conv2d_backward(y, x, w, stride=1, pad=0, groups=1)
    >>> turned = w[::-1, ::-1].transpose(0, 1, 3, 2)
    >>> np.array_equal(dx, conv2d_forward(y, turned, b, stride=1, pad=2, groups=1))
    True
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def conv2d_forward(x: np.ndarray, w: np.ndarray, b: np.ndarray, *, stride: int, pad: int, groups: int) -> np.ndarray:
    """x (N, H, W, Cin), w (KH, KW, Cin/groups, Cout), b (Cout,) -> y (N, OH, OW, Cout); keep x."""
    kh, kw, _, maps = w.shape
    n, oh, ow = x.shape[0], _windows(x.shape[1], kh, stride, pad), _windows(x.shape[2], kw, stride, pad)
    p = _pad(x, pad)
    y = np.empty((n, oh, ow, maps), dtype=x.dtype)
    y[:] = b
    for ins, outs in _groups(x.shape[3], maps, groups):
        for i in range(kh):
            for j in range(kw):
                pixels = p[:, _every(i, oh, stride), _every(j, ow, stride), ins]
                y[..., outs] += _matmul(pixels, w[i, j, :, outs])
    return y


def conv2d_backward(
    dy: np.ndarray, x: np.ndarray, w: np.ndarray, *, stride: int, pad: int, groups: int, need_dx: bool = True
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """dy (N, OH, OW, Cout) and the forward pass's x and w -> dx like x or None, dw like w, db (Cout,)."""
    kh, kw, _, maps = w.shape
    _, oh, ow, _ = dy.shape
    p = _pad(x, pad)
    dp = np.zeros_like(p)
    dw = np.empty_like(w)
    for ins, outs in _groups(x.shape[3], maps, groups):
        rows = _rows(dy[..., outs])
        for i in range(kh):
            for j in range(kw):
                at = (slice(None), _every(i, oh, stride), _every(j, ow, stride), ins)
                dw[i, j, :, outs] = _rows(p[at]).T @ rows
                if need_dx:
                    dp[at] += _matmul(dy[..., outs], w[i, j, :, outs].T)
    dx = dp[:, pad : pad + x.shape[1], pad : pad + x.shape[2], :] if need_dx else None
    return dx, dw, dy.sum(axis=(0, 1, 2))


def _windows(length: int, kernel: int, stride: int, pad: int) -> int:
    """Positions of a kernel along a padded side; what is left over at the end is not covered."""
    return (length + 2 * pad - kernel) // stride + 1


def _pad(x: np.ndarray, pad: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))


def _every(start: int, count: int, stride: int) -> slice:
    """start, start + stride, ...: ``count`` positions, those of one kernel offset in all windows."""
    return slice(start, start + stride * (count - 1) + 1, stride)


def _groups(channels: int, maps: int, groups: int) -> Iterator[tuple[slice, slice]]:
    """Input and output channels of each group."""
    a, o = channels // groups, maps // groups
    for g in range(groups):
        yield slice(g * a, (g + 1) * a), slice(g * o, (g + 1) * o)


def _rows(pixels: np.ndarray) -> np.ndarray:
    """(N, R, C, channels) -> (N R C, channels): one pixel a row."""
    return pixels.reshape(-1, pixels.shape[-1])


def _matmul(pixels: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(N, R, C, a) times (a, o) -> (N, R, C, o), as one matrix product."""
    return (_rows(pixels) @ w).reshape(*pixels.shape[:-1], w.shape[1])
