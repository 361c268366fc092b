"""Momentum, weight decay and update of fc7's 16.8 million weights."""

from __future__ import annotations

import numpy as np

import net.cpu
from bench.kernels.exhibit import Exhibit, Step

LR, MOMENTUM, DECAY = np.float32(0.01), np.float32(0.9), np.float32(5e-4)


def exhibit(count: int) -> Exhibit:
    random = np.random.default_rng(7)
    start, momenta, dw = (random.standard_normal(count, dtype=np.float32) for _ in range(3))
    w, v, scratch = (np.empty_like(start) for _ in range(3))
    wide_w, wide_v = start.astype(np.float64), momenta.astype(np.float64)
    wide_v = float(MOMENTUM) * wide_v - float(DECAY) * float(LR) * wide_w - float(LR) * dw

    def fresh() -> None:
        np.copyto(w, start)
        np.copyto(v, momenta)

    def plain() -> np.ndarray:
        v[:] = MOMENTUM * v - DECAY * LR * w - LR * dw
        w[:] = w + v
        return w

    def in_place() -> np.ndarray:
        np.multiply(v, MOMENTUM, out=v)
        for array, factor in ((w, DECAY * LR), (dw, LR)):
            np.multiply(array, factor, out=scratch)
            np.subtract(v, scratch, out=v)
        np.add(w, v, out=w)
        return w

    def kernel() -> np.ndarray:
        net.cpu.sgd_update(w, v, dw, lr=float(LR), momentum=float(MOMENTUM), decay=float(DECAY))
        return w

    return Exhibit(
        f"SGD update, {count / 1e6:.1f} M weights",
        wide_w + wide_v,
        (
            Step("NumPy", "the formula; a temporary array for each operation", plain, fresh),
            Step("NumPy in place", "one temporary array, used again", in_place, fresh),
            Step("one pass", "three reads and two writes an element; all cores", kernel, fresh),
        ),
        1e-6,
    )
