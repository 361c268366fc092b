"""Local response normalisation over neighbouring channels (paper, section 3.3).

Shapes
    x, s, y (N, H, W, C), all float32, or all float64 in checks; every pixel on its own.

Forward
    With h = size // 2, the paper's n / 2 rounded down::

        s[i] = k + alpha * sum_{j = max(0, i - h)}^{min(C - 1, i + h)} x[j]²
        y[i] = x[i] * s[i]^-beta

    i and j count channels. size = 4 and size = 5 both give h = 2, five channels. ``alpha`` is what stands in front of
    the sum. The paper says alpha = 1e-4 with n = 5; its authors' code divides that by n first, which makes 2e-5. The
    caller divides where a recipe asks for it; here alpha is taken as given.

Backward
    x[i] acts in two places: on its own y[i] as the factor in front, and on the s of every channel j within h of i, its
    own s[i] among them. That is why there are two terms. From the definitions::

        as the factor:   ∂y[i]/∂x[i] = s[i]^-beta   with s[i] held fast
        by way of s[j]:  ∂y[j]/∂s[j] = -beta x[j] s[j]^(-beta - 1)
                         ∂s[j]/∂x[i] = 2 alpha x[i]   where |i - j| <= h, else 0

    Both ways together, by the chain rule (2 alpha beta x[i] is the same for all j and stands before the sum)::

        dx[i] = dy[i] s[i]^-beta - 2 alpha beta x[i] * sum_{|j - i| <= h} dy[j] x[j] s[j]^(-beta - 1)

    The neighbourhood "within h" is symmetric, so the sum runs over the same clipped window as the forward pass, and
    both passes use one function for it.

Example
    One pixel of three channels, s = 1 + the sum of squares over three channels, y = x / s. With dy = (1, 0, 0) only
    y[0] = x[0] / (1 + x[0]² + x[1]²) matters, and by hand::

        dx[0] = 1 / 6 - 1 * 2 * 1 / 6² = 1/9        dx[1] = -1 * 2 * 2 / 6² = -1/9        dx[2] = 0

    >>> x = np.array([1.0, 2.0, 0.0]).reshape(1, 1, 1, 3)
    >>> y, s = lrn_forward(x, size=3, k=1.0, alpha=1.0, beta=1.0)
    >>> s.ravel()
    array([6., 6., 5.])
    >>> dy = np.array([1.0, 0.0, 0.0]).reshape(1, 1, 1, 3)
    >>> dx = lrn_backward(dy, x, s, size=3, alpha=1.0, beta=1.0)
    >>> (9 * dx.ravel()).round(10).tolist()
    [1.0, -1.0, 0.0]
"""

from __future__ import annotations

import numpy as np


def lrn_forward(x: np.ndarray, *, size: int, k: float, alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """x (N, H, W, C) -> y, s of the same shape; keep x and s."""
    s = k + alpha * _sum_over_window(x * x, size)
    return x * s**-beta, s


def lrn_backward(dy: np.ndarray, x: np.ndarray, s: np.ndarray, *, size: int, alpha: float, beta: float) -> np.ndarray:
    """dy, x, s (N, H, W, C) -> dx."""
    through_s = _sum_over_window(dy * x * s ** (-beta - 1), size)
    return dy * s**-beta - 2 * alpha * beta * x * through_s


def _sum_over_window(a: np.ndarray, size: int) -> np.ndarray:
    """At each channel i the sum of a[i - h] .. a[i + h]; channels beyond the first and last count as 0."""
    h = size // 2
    channels = a.shape[-1]
    padded = np.pad(a, ((0, 0), (0, 0), (0, 0), (h, h)))
    total = np.zeros_like(a)
    for offset in range(2 * h + 1):
        total += padded[..., offset : offset + channels]
    return total
