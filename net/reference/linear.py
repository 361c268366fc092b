"""Fully connected layer (paper, section 3.5: fc6, fc7, fc8).

Shapes
    x (N, Cin), w (Cin, Cout), b (Cout,), y (N, Cout), all float32, or all float64 in checks

Forward
    ``y[n, o] = b[o] + sum_i x[n, i] w[i, o]``, that is ``y = x w + b``.

Backward
    Each input and parameter collects dy from every output it takes part in:

    - x[n, i] enters y[n, o] with the factor w[i, o]:  ``dx[n, i] = sum_o dy[n, o] w[i, o]``,  ``dx = dy wᵀ``
    - w[i, o] enters y[n, o] with the factor x[n, i]:  ``dw[i, o] = sum_n x[n, i] dy[n, o]``,  ``dw = xᵀ dy``
    - b[o] enters y[n, o] with the factor 1:           ``db[o] = sum_n dy[n, o]``

    The sums over n have no 1/N: the loss's gradient already carries it (``cross_entropy``).

Example
    >>> x, w, b = np.array([[1.0, 2.0]]), np.array([[1.0, 0.0, 2.0], [3.0, 1.0, 0.0]]), np.array([0.0, 10.0, 0.0])
    >>> linear_forward(x, w, b)
    array([[ 7., 12.,  2.]])
    >>> dx, dw, db = linear_backward(np.array([[1.0, 0.0, -1.0]]), x, w)
    >>> dx
    array([[-1.,  3.]])
    >>> dw
    array([[ 1.,  0., -1.],
           [ 2.,  0., -2.]])
"""

from __future__ import annotations

import numpy as np


def linear_forward(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x (N, Cin), w (Cin, Cout), b (Cout,) -> y (N, Cout); keep x for the backward pass."""
    return x @ w + b


def linear_backward(
    dy: np.ndarray, x: np.ndarray, w: np.ndarray, *, need_dx: bool = True
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """dy (N, Cout) -> dx (N, Cin) or None, dw (Cin, Cout), db (Cout,)."""
    dx = dy @ w.T if need_dx else None
    return dx, x.T @ dy, dy.sum(axis=0)
