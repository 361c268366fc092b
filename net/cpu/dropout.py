"""Dropout: y = x * mask * scale, dx = dy * mask * scale.

The mask is a pure function of key = (seed, step, layer) and of the element's place (see ``net/reference/dropout.py``),
so nothing is kept: the backward pass draws it again. Four elements share one Philox counter, and the mask is never
written to memory.

Gain: 4.1 to 2.5 ms (128 x 4096, `python -m bench.cpu_small`, docs/cpu.md).
"""

from __future__ import annotations

import math

import numpy as np

from net.cpu.jit import kernel, prange
from net.cpu.memory import contiguous, empty
from net.cpu.philox import philox4x32

Key = tuple[int, int | np.ndarray, int]  # seed, step (a number or an array of one element), layer


def dropout_forward(x: np.ndarray, *, keep: float, scale: float, key: Key, first: int | np.ndarray = 0) -> np.ndarray:
    """x -> y of the same shape; keep the key."""
    return _masked(x, keep, scale, key, first)


def dropout_backward(dy: np.ndarray, *, keep: float, scale: float, key: Key, first: int | np.ndarray = 0) -> np.ndarray:
    """dy -> dx of the same shape."""
    return _masked(dy, keep, scale, key, first)


def _masked(x: np.ndarray, keep: float, scale: float, key: Key, first: int | np.ndarray) -> np.ndarray:
    seed, step, layer = int(key[0]), int(np.asarray(key[1]).item()), int(key[2])
    x = contiguous(x)
    y = empty(x.shape)
    words = np.array([layer, step % 2**32, step >> 32, seed % 2**32, seed >> 32], dtype=np.uint32)
    # keep = 1 makes the bound 2**32, one more than fits 32 bits: every word is below it.
    start = int(np.asarray(first).item()) * math.prod(x.shape[1:])
    _mask(x.reshape(-1), y.reshape(-1), start, words, np.uint64(math.floor(keep * 2**32)), np.float32(scale))
    return y


@kernel
def _mask(x: np.ndarray, y: np.ndarray, start: int, words: np.ndarray, bound: np.uint64, scale: np.float32) -> None:
    skipped = start % 4  # elements of the first block that belong to the rows before
    blocks = (skipped + x.size + 3) // 4
    run = 1024  # blocks a task
    for task in prange((blocks + run - 1) // run):
        for block in range(task * run, min(blocks, (task + 1) * run)):
            drawn = philox4x32(np.uint32(start // 4 + block), words[0], words[1], words[2], words[3], words[4])
            e = block * 4 - skipped
            for i in range(max(0, -e), min(4, x.size - e)):
                # A product, not a selection: 0 times NaN is NaN, as in the formula.
                kept = np.float32(1) if np.uint64(drawn[i]) < bound else np.float32(0)
                y[e + i] = x[e + i] * kept * scale
