"""The gradient of a fully connected layer's weights, dw = xᵀ dy, computed while the update reads it.

dw is as large as w (fc6: 151 MB) and wanted once, by the update, which reads w and v as well. Written whole it would go
out to memory and come back. So the backward pass leaves a :class:`WeightGradient`, both operands as the product likes
them, and ``sgd_update`` computes some rows of dw at a time and changes those of w and v while they are in the cache.
Who wants the array itself, as processes that add up their gradients do, gets it from ``np.asarray``.

The rows of xᵀ are the left operand, dy packed into panels the right one. Every element is one sum in a fixed order, so
nothing depends on the number of threads.

Gain (batch 128): fc6 and fc7, backward and update, 86 to 65 and 41 to 33 ms (docs/cpu.md, "Single changes").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import DTypeLike

from net.cpu.jit import inner, kernel, prange
from net.cpu.memory import empty
from net.cpu.product import times_panels
from net.cpu.simd import BLOCK, PANEL, lines

ROWS: Final = 8 * BLOCK  # rows of w or dw at a time
SHIFT: Final = 16  # floats in a cache line: keeps rows of a power of two apart in the cache
_GROUP: Final = 16  # panels of dy at a time: with 128 images as many bytes as half a second-level cache


@dataclass(frozen=True, eq=False)
class WeightGradient:
    """dw (Cin, Cout), float32, of ``images`` pictures.

    ``turned`` (Cin, images + SHIFT) is xᵀ, ``panels`` (ceil(Cout / PANEL) * images * PANEL,) is dy as panels of maps,
    [panel][image].
    """

    shape: tuple[int, int]
    turned: np.ndarray
    panels: np.ndarray
    images: int

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the gradient has not been computed yet: it cannot be had without a copy")
        dw = empty(self.shape)
        _compute(self.turned.reshape(-1), self.panels, self.images, dw.reshape(-1), self.shape[1])
        return dw.astype(dtype or np.float32, copy=False)

    def descend(self, w: np.ndarray, v: np.ndarray, momentum: np.float32, shrink: np.float32, rate: np.float32) -> None:
        """v <- momentum * v - shrink * w - rate * dw; w <- w + v, both flat and in place."""
        _descend(self.turned.reshape(-1), self.panels, self.images, w, v, self.shape[1], momentum, shrink, rate)


@kernel
def _compute(x: np.ndarray, dy: np.ndarray, images: int, dw: np.ndarray, maps: int) -> None:
    depth, wide = dw.size // maps, (maps + PANEL - 1) // PANEL * PANEL
    for block in prange((depth + ROWS - 1) // ROWS):
        first = block * ROWS
        rows = min(ROWS, depth - first)
        some = lines(ROWS * wide)
        _rows(x, dy, images, wide, first, rows, some)
        for i in range(rows):
            at = (first + i) * maps
            for o in range(maps):
                dw[at + o] = some[i * wide + o]


@kernel
def _descend(
    x: np.ndarray,
    dy: np.ndarray,
    images: int,
    w: np.ndarray,
    v: np.ndarray,
    maps: int,
    momentum: np.float32,
    shrink: np.float32,
    rate: np.float32,
) -> None:
    depth, wide = w.size // maps, (maps + PANEL - 1) // PANEL * PANEL
    for block in prange((depth + ROWS - 1) // ROWS):
        first = block * ROWS
        rows = min(ROWS, depth - first)
        dw = lines(ROWS * wide)
        _rows(x, dy, images, wide, first, rows, dw)
        for i in range(rows):
            at = (first + i) * maps
            w_row, v_row, dw_row = w[at : at + maps], v[at : at + maps], dw[i * wide : i * wide + maps]
            for o in range(maps):
                v_row[o] = momentum * v_row[o] - shrink * w_row[o] - rate * dw_row[o]
                w_row[o] += v_row[o]


@inner
def _rows(x: np.ndarray, dy: np.ndarray, images: int, wide: int, first: int, rows: int, dw: np.ndarray) -> None:
    """``rows`` rows of dw from ``first`` on, each as long as all panels of dy."""
    row = images + SHIFT
    panels = wide // PANEL
    for group in range(0, panels, _GROUP):
        for i in range(0, rows, BLOCK):
            times_panels(
                x,
                (first + i) * row,
                row,
                dy,
                group * images * PANEL,
                images * PANEL,
                dw,
                i * wide + group * PANEL,
                wide,
                PANEL,
                min(BLOCK, rows - i),
                2 * min(_GROUP, panels - group),
                images,
            )
