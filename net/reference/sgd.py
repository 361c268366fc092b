"""Stochastic gradient descent with momentum and weight decay (paper, section 5).

Shapes
    w (a parameter), v (its velocity, in the code around it called momentum) and dw (its gradient g) of any one shape,
    float32, or float64 in checks

Formula
    With the batch's mean gradient g::

        v <- momentum * v - decay * lr * w - lr * g
        w <- w + v

    In the paper momentum = 0.9 and decay = 0.0005. v is a velocity: it keeps 0.9 of itself each step, so under a
    constant gradient it grows to 1 / (1 - 0.9) = 10 times -lr * g. The learning rate stands *inside* v. Frameworks
    that write v <- momentum * v + g, w <- w - lr * v do the same while lr is constant. When it is lowered, their
    steps shrink at once, where here the speed gathered at the old rate runs out over the next steps.

    The decay is there because decay * w is the gradient of decay / 2 * w²: the formula is that of a loss with this
    term added, whose gradient is g + decay * w. Hence it goes through v as g does. Where g is 0, v settles at
    -10 * decay * lr * w, and w shrinks by 10 * 0.0005 * 0.01 = 0.00005 of itself a step, not by 0.000005.

Example
    >>> w, v, g = np.array([1.0]), np.array([0.0]), np.array([2.0])
    >>> sgd_update(w, v, g, lr=0.01, momentum=0.9, decay=0.0005)
    >>> v, w  # v = 0.9 * 0 - 0.0005 * 0.01 * 1 - 0.01 * 2
    (array([-0.020005]), array([0.979995]))
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
