"""Stochastic gradient descent with momentum and weight decay (paper, section 5).

Shapes
    w (a parameter), v (its velocity, elsewhere called momentum) and dw (its gradient g) of any one shape, float32, or
    float64 in checks

Formula
    With the batch's mean gradient g::

        v <- momentum * v - decay * lr * w - lr * g
        w <- w + v

    In the paper momentum = 0.9 and decay = 0.0005. v is a velocity: it keeps 0.9 of itself each step, so a constant
    gradient moves w by up to 1 / (1 - 0.9) = 10 times lr * g a step. The learning rate stands *inside* v; frameworks
    that write v <- momentum * v + g, w <- w - lr * v behave differently in the steps after lr has been lowered.
"""

from __future__ import annotations

import numpy as np


def sgd_update(
    w: np.ndarray, v: np.ndarray, dw: np.ndarray, *, lr: float | np.ndarray, momentum: float, decay: float
) -> None:
    """Update w and v in place; all three of one shape. ``lr`` is a number or an array of one element."""
    rate = float(np.asarray(lr).item())
    v[:] = momentum * v - decay * rate * w - rate * dw
    w += v
