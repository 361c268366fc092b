"""Rectified linear unit (paper, section 3.1).

Shapes
    x, y of any one shape, float32, or float64 in checks

Forward
    ``y = max(x, 0)``, element by element.

Backward
    The derivative of max(x, 0) is 1 where x > 0 and 0 where x < 0. At x = 0 there is none; any value in [0, 1] is a
    subgradient, and 0 is the custom. So ``dx = dy where x > 0, else 0``.
    Since y > 0 exactly where x > 0, the output is all that has to be kept.

Example
    >>> y = relu_forward(np.array([-2.0, 0.0, 3.0]))
    >>> y
    array([0., 0., 3.])
    >>> relu_backward(np.array([5.0, 6.0, 7.0]), y)
    array([0., 0., 7.])

NaN is not less than 0, so it goes through instead of turning into a harmless 0.
"""

from __future__ import annotations

import numpy as np


def relu_forward(x: np.ndarray) -> np.ndarray:
    """x -> y of the same shape; keep y for the backward pass."""
    return np.where(x < 0, 0, x)


def relu_backward(dy: np.ndarray, y: np.ndarray) -> np.ndarray:
    """dy, y of one shape -> dx."""
    return np.where(y > 0, dy, 0)
