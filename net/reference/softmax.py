"""Softmax: the scores of the classes turned into probabilities (paper, section 3.5).

Shapes
    z, p (N, classes), float32, or float64 in checks

Formula
    ``p[n, c] = exp(z[n, c]) / sum_j exp(z[n, j])``

    A constant added to all scores of an image cancels. Subtracting the largest makes every exponent 0 or less, so
    nothing overflows, and the sum is at least 1.

In training the softmax is part of the loss, and its backward pass with it: see ``cross_entropy.py``.

Example
    >>> softmax(np.array([[0.0, np.log(3.0)], [1000.0, 1000.0]]))
    array([[0.25, 0.75],
           [0.5 , 0.5 ]])
"""

from __future__ import annotations

import numpy as np


def softmax(z: np.ndarray) -> np.ndarray:
    """z (N, classes) -> p of the same shape, rows summing to 1."""
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
