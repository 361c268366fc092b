"""Local response normalisation over neighbouring channels.

::

    s[i]  = k + alpha * sum_{|j - i| <= h} x[j]²                  h = size // 2, channels beyond the ends count as 0
    y[i]  = x[i] s[i]^-beta
    dx[i] = dy[i] s[i]^-beta - 2 alpha beta x[i] * sum_{|j - i| <= h} dy[j] x[j] s[j]^(-beta - 1)

One pass over memory: a pixel's channels are squared into a row with h zeros at both ends, so that the window needs no
bounds, and stay in the first-level cache until y is written. The usual beta of 3/4 needs no power function: with
r = sqrt(s), s^-3/4 = 1 / (r sqrt(r)), two instructions for eight channels where ``pow`` takes some fifty for one.

Gain: see ``finish.py``, of which this is a part. Block 1 backward as vector code: 45 to 32 ms (docs/cpu.md).
"""

from __future__ import annotations

import numpy as np

from net.cpu.jit import inner, kernel, prange
from net.cpu.memory import contiguous, empty
from net.shapes import require_shape


def lrn_forward(x: np.ndarray, *, size: int, k: float, alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """x (N, H, W, C) -> y, s of the same shape; keep x and s."""
    x = contiguous(x)
    y, s = empty(x.shape), empty(x.shape)
    rows = (-1, *x.shape[2:])
    numbers = (np.float32(k), np.float32(alpha), np.float32(beta))
    _forward(x.reshape(rows), y.reshape(rows), s.reshape(rows), size // 2, *numbers)
    return y, s


def lrn_backward(dy: np.ndarray, x: np.ndarray, s: np.ndarray, *, size: int, alpha: float, beta: float) -> np.ndarray:
    """dy, x, s (N, H, W, C) -> dx."""
    dy, x, s = contiguous(dy), contiguous(x), contiguous(s)
    require_shape("x", x, dy.shape)
    require_shape("s", s, dy.shape)
    dx = empty(dy.shape)
    rows = (-1, *x.shape[2:])
    arrays = (a.reshape(rows) for a in (dy, x, s, dx))
    _backward(*arrays, size // 2, np.float32(2 * alpha * beta), np.float32(beta))
    return dx


@inner
def normalise(
    x: np.ndarray,
    half: int,
    k: np.float32,
    alpha: np.float32,
    beta: np.float32,
    squares: np.ndarray,
    s: np.ndarray,
    y: np.ndarray,
) -> None:
    """A row of pixels: y and s (W, C) from x. ``squares`` (C + 2 half,), zero in its end places, is scratch."""
    width, channels = x.shape
    if half != 2 or beta != np.float32(0.75):
        scales(x, half, k, alpha, squares, s)
        for q in range(width):
            for c in range(channels):
                y[q, c] = x[q, c] * s[q, c] ** -beta
        return
    inside = squares[2 : 2 + channels]  # every AlexNet, in one loop
    for q in range(width):
        for c in range(channels):
            inside[c] = x[q, c] * x[q, c]
        for c in range(channels):
            total = ((squares[c] + squares[c + 4]) + (squares[c + 1] + squares[c + 3])) + squares[c + 2]
            v = k + alpha * total
            root = np.sqrt(v)
            s[q, c] = v
            y[q, c] = x[q, c] / (root * np.sqrt(root))


@inner
def scales(x: np.ndarray, half: int, k: np.float32, alpha: np.float32, squares: np.ndarray, s: np.ndarray) -> None:
    """A row of pixels: s (W, C) alone, for a backward pass that did not keep it. ``squares`` as in ``normalise``."""
    width, channels = x.shape
    inside = squares[half : half + channels]
    for q in range(width):
        for c in range(channels):
            inside[c] = x[q, c] * x[q, c]
        if half == 2:
            for c in range(channels):
                total = ((squares[c] + squares[c + 4]) + (squares[c + 1] + squares[c + 3])) + squares[c + 2]
                s[q, c] = k + alpha * total
        else:
            for c in range(channels):
                s[q, c] = squares[c]
            for offset in range(1, 2 * half + 1):
                for c in range(channels):
                    s[q, c] += squares[c + offset]
            for c in range(channels):
                s[q, c] = k + alpha * s[q, c]


@inner
def denormalise(
    dy: np.ndarray,
    x: np.ndarray,
    s: np.ndarray,
    half: int,
    factor: np.float32,
    beta: np.float32,
    products: np.ndarray,
    power: np.ndarray,
    dx: np.ndarray,
) -> None:
    """A row of pixels: dx (W, C) from dy, x and s; ``factor`` is 2 alpha beta. dx is not dy.

    ``products`` (C + 2 half,), zero in its end places, and ``power`` (C,) are scratch.
    """
    width, channels = x.shape
    inside = products[half : half + channels]
    for q in range(width):
        if beta == np.float32(0.75):
            for c in range(channels):
                root = np.sqrt(s[q, c])
                p = np.float32(1) / (root * np.sqrt(root))
                power[c] = p
                inside[c] = dy[q, c] * x[q, c] * p * (p * p * root)  # p² sqrt(s) is 1 / s, without a division
        else:
            for c in range(channels):
                power[c] = s[q, c] ** -beta
                inside[c] = dy[q, c] * x[q, c] * power[c] / s[q, c]
        if half == 2:
            for c in range(channels):
                total = ((products[c] + products[c + 4]) + (products[c + 1] + products[c + 3])) + products[c + 2]
                dx[q, c] = dy[q, c] * power[c] - factor * x[q, c] * total
        else:
            for c in range(channels):
                dx[q, c] = dy[q, c] * power[c]
                power[c] = products[c]
            for offset in range(1, 2 * half + 1):
                for c in range(channels):
                    power[c] += products[c + offset]
            for c in range(channels):
                dx[q, c] -= factor * x[q, c] * power[c]


@kernel
def _forward(
    x: np.ndarray, y: np.ndarray, s: np.ndarray, half: int, k: np.float32, alpha: np.float32, beta: np.float32
) -> None:
    for row in prange(len(x)):
        squares = np.zeros(x.shape[2] + 2 * half, np.float32)
        normalise(x[row], half, k, alpha, beta, squares, s[row], y[row])


@kernel
def _backward(
    dy: np.ndarray, x: np.ndarray, s: np.ndarray, dx: np.ndarray, half: int, factor: np.float32, beta: np.float32
) -> None:
    for row in prange(len(x)):
        products = np.zeros(x.shape[2] + 2 * half, np.float32)
        power = np.empty(x.shape[2], np.float32)
        denormalise(dy[row], x[row], s[row], half, factor, beta, products, power, dx[row])
