"""Softmax, and softmax with cross-entropy and its gradient in one pass over the scores.

::

    p[n, c]  = exp(z[n, c] - m) / sum_j exp(z[n, j] - m)            m = max_j z[n, j]
    loss[n]  = log(sum_j exp(z[n, j] - m)) - (z[n, t] - m)          t = label of image n
    dz[n, c] = (p[n, c] - [c = t]) / N

A row of scores stays in the cache through its three loops. The sum is accumulated in double precision; with 1000
terms that is free and removes the only rounding error that would grow with the number of classes.

Gain: none in time, see docs/cpu.md.
"""

from __future__ import annotations

import numpy as np

from net.cpu.jit import inner, kernel, prange
from net.cpu.memory import contiguous, empty


def softmax(z: np.ndarray) -> np.ndarray:
    """z (N, classes) -> p of the same shape, rows summing to 1."""
    z = contiguous(z)
    p = empty(z.shape)
    _softmax(z, p)
    return p


def cross_entropy(z: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z (N, classes), labels (N,) -> loss of each image (N,), gradient of their mean dz (N, classes)."""
    z, labels = contiguous(z), contiguous(labels, np.int32)
    if labels.size and not 0 <= labels.min() <= labels.max() < z.shape[1]:
        raise ValueError(f"labels must lie between 0 and {z.shape[1] - 1}")
    loss, dz = empty(z.shape[0]), empty(z.shape)
    _cross_entropy(z, labels, loss, dz)
    return loss, dz


@inner
def _exponentials(z: np.ndarray, e: np.ndarray) -> tuple[np.float32, np.float64]:
    """``e = exp(z - m)`` for one row; returns m and the sum. A NaN in the row makes the sum NaN."""
    m = z[0]
    for c in range(z.size):
        m = z[c] if z[c] > m else m
    total = np.float64(0)
    for c in range(z.size):
        e[c] = np.exp(z[c] - m)
        total += np.float64(e[c])
    return m, total


@kernel
def _softmax(z: np.ndarray, p: np.ndarray) -> None:
    for n in prange(z.shape[0]):
        _, total = _exponentials(z[n], p[n])
        factor = np.float32(1 / total)
        for c in range(z.shape[1]):
            p[n, c] *= factor


@kernel
def _cross_entropy(z: np.ndarray, labels: np.ndarray, loss: np.ndarray, dz: np.ndarray) -> None:
    images, classes = z.shape
    for n in prange(images):
        t = labels[n]
        m, total = _exponentials(z[n], dz[n])
        loss[n] = np.log(total) - np.float64(z[n, t] - m)
        factor, share = np.float32(1 / total), np.float32(1 / images)
        for c in range(classes):
            dz[n, c] = (dz[n, c] * factor - (np.float32(1) if c == t else np.float32(0))) * share
