"""Stochastic gradient descent with momentum and weight decay, in place.

::

    v <- momentum * v - decay * lr * w - lr * dw
    w <- w + v

One pass: three reads and two writes an element, the least that is possible; it runs at the speed of the memory. As
separate NumPy statements it would be four passes with temporary arrays of the size of w.

Gain: NumPy 69 ms, in place 28, one pass 16 (16.8 million weights, `python -m bench.kernels update`, docs/cpu.md).
"""

from __future__ import annotations

import numpy as np

from net.cpu.jit import kernel, prange
from net.cpu.memory import contiguous, empty
from net.cpu.weight_gradient import WeightGradient
from net.shapes import require_shape


def sgd_update(
    w: np.ndarray,
    v: np.ndarray,
    dw: np.ndarray | WeightGradient,
    *,
    lr: float | np.ndarray,
    momentum: float,
    decay: float,
) -> None:
    """Update w and v in place; all three of one shape. ``lr`` is a number or an array of one element."""
    if not (w.flags.carray and v.flags.carray):
        raise ValueError("w and v are updated in place and must be C-contiguous and writeable")
    require_shape("v", v, w.shape)
    require_shape("dw", dw, w.shape)
    global _count
    _count += 1
    rate = float(np.asarray(lr).item())
    numbers = np.float32(momentum), np.float32(decay * rate), np.float32(rate)
    if isinstance(dw, WeightGradient):
        dw.descend(w.reshape(-1), v.reshape(-1), *numbers)
    else:
        _update(w.reshape(-1), v.reshape(-1), contiguous(dw).reshape(-1), *numbers)


_count = 0


def count() -> int:
    """How many updates there have been: what was derived from parameters holds as long as this does not change."""
    return _count


def start() -> None:
    """Start Numba, which takes a quarter of a second when the first kernel is called, whichever that is."""
    nothing, zero = empty(0), np.float32(0)
    _update(nothing, nothing, nothing, zero, zero, zero)


@kernel
def _update(
    w: np.ndarray, v: np.ndarray, dw: np.ndarray, momentum: np.float32, shrink: np.float32, rate: np.float32
) -> None:
    # In runs of a fixed length: the last few elements of a loop go through other instructions, which may round
    # otherwise, and which elements those are must not depend on the number of threads.
    run = 1 << 14
    for task in prange((w.size + run - 1) // run):
        for i in range(task * run, min(w.size, (task + 1) * run)):
            v[i] = momentum * v[i] - shrink * w[i] - rate * dw[i]
            w[i] += v[i]
