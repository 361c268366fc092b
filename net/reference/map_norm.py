"""Response normalisation over neighbouring pixels of the same map.

Not in the paper. Net 145 of the authors' published code, whose results are those of the paper, has it after the LRN
that follows conv2 (``type=rnorm``: size 5, scale 0.001, pow 0.75). k = 1 is that code's default as far as we could find
out, not a figure read in the net's configuration.

Shapes
    x, s, y (N, H, W, C), all float32, or all float64 in checks; every channel on its own.

Forward
    With h = size // 2 and the window clipped at the map's border::

        s[r, c] = k + alpha * sum_{|p - r| <= h, |q - c| <= h} x[p, q]²
        y[r, c] = x[r, c] * s[r, c]^-beta

    ``alpha`` is what stands in front of the sum (the authors' code divides its scale by size² first).

Backward
    The same formula as in ``lrn.py`` with "pixels within h" in place of "channels within h"; that neighbourhood is
    symmetric too, so the derivation there holds word for word::

        dx[r, c] = dy[r, c] s[r, c]^-beta - 2 alpha beta x[r, c] * sum_{window} dy x s^(-beta - 1)

Example
    The numbers of ``lrn.py``'s example on pixels in place of channels. Each window holds all four, so s = 6 everywhere:

    >>> x = np.array([[1.0, 2.0], [0.0, 0.0]]).reshape(1, 2, 2, 1)
    >>> y, s = map_norm_forward(x, size=3, k=1.0, alpha=1.0, beta=1.0)
    >>> s.ravel()
    array([6., 6., 6., 6.])
    >>> dy = np.array([[1.0, 0.0], [0.0, 0.0]]).reshape(1, 2, 2, 1)
    >>> dx = map_norm_backward(dy, x, s, size=3, alpha=1.0, beta=1.0)
    >>> (9 * dx.ravel()).round(10).tolist()
    [1.0, -1.0, 0.0, 0.0]
"""

from __future__ import annotations

import numpy as np


def map_norm_forward(x: np.ndarray, *, size: int, k: float, alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """x (N, H, W, C) -> y, s of the same shape; keep x and s."""
    s = k + alpha * _sum_over_window(x * x, size)
    return x * s**-beta, s


def map_norm_backward(
    dy: np.ndarray, x: np.ndarray, s: np.ndarray, *, size: int, alpha: float, beta: float
) -> np.ndarray:
    """dy, x, s (N, H, W, C) -> dx."""
    through_s = _sum_over_window(dy * x * s ** (-beta - 1), size)
    return dy * s**-beta - 2 * alpha * beta * x * through_s


def _sum_over_window(a: np.ndarray, size: int) -> np.ndarray:
    """At each pixel the sum over the (2h + 1) x (2h + 1) pixels around it; beyond the border counts as 0."""
    h = size // 2
    _, height, width, _ = a.shape
    padded = np.pad(a, ((0, 0), (h, h), (h, h), (0, 0)))
    total = np.zeros_like(a)
    for i in range(2 * h + 1):
        for j in range(2 * h + 1):
            total += padded[:, i : i + height, j : j + width, :]
    return total
