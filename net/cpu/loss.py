"""Softmax, and softmax with cross-entropy and its gradient.

The formulas are in ``net/reference/softmax.py`` and ``cross_entropy.py``::

    p[n, c]  = exp(z[n, c] - m) / sum_j exp(z[n, j] - m)            m = max_j z[n, j]
    loss[n]  = log(sum_j exp(z[n, j] - m)) - (z[n, t] - m)          t = label of image n
    dz[n, c] = (p[n, c] - [c = t]) / N

The one file here without a kernel: NumPy takes the exponentials of many numbers with one vector instruction after
another, where Numba, without a vector exponential of its own, calls a function for each number. All passes go over one
array, which the gradient becomes. Sums are double, which is free and removes the only rounding error that would grow
with the number of classes.

Gain: a kernel took 0.62 ms for 128 x 1000 scores; this takes 0.21 (`python -m bench.cpu_small`, docs/cpu.md).
"""

from __future__ import annotations

import numpy as np

from net.cpu.memory import contiguous, empty
from net.shapes import require_shape


def softmax(z: np.ndarray) -> np.ndarray:
    """z (N, classes) -> p of the same shape, rows summing to 1."""
    p, total = _exponentials(_shifted(z))
    p *= (1 / total).astype(np.float32)[:, np.newaxis]
    return p


def cross_entropy(z: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z (N, classes), labels (N,) -> loss of each image (N,), gradient of their mean dz (N, classes)."""
    labels = contiguous(labels, np.int32)
    require_shape("labels", labels, (len(z),))
    if labels.size and not 0 <= labels.min() <= labels.max() < z.shape[1]:
        raise ValueError(f"labels must lie between 0 and {z.shape[1] - 1}")
    shifted, rows = _shifted(z), np.arange(len(z))
    of_label = shifted[rows, labels]
    dz, total = _exponentials(shifted)
    loss = (np.log(total) - of_label).astype(np.float32)
    dz *= (1 / total).astype(np.float32)[:, np.newaxis]
    dz[rows, labels] -= 1
    dz *= np.float32(1 / len(z))
    return loss, dz


def _shifted(z: np.ndarray) -> np.ndarray:
    """z - m in an array of its own, float32."""
    z, shifted = contiguous(z), empty(z.shape)
    # Infinity less infinity is a NaN, a distance too large for float32 infinite; training finds both in the loss.
    with np.errstate(invalid="ignore", over="ignore"):
        return np.subtract(z, z.max(axis=1, keepdims=True), out=shifted)


def _exponentials(shifted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """exp(shifted) in its place, and the rows' sums in double."""
    e = np.exp(shifted, out=shifted)
    return e, e.sum(axis=1, dtype=np.float64)
