"""Fully connected layer, alone and with the ReLU after it: y = x w + b; dx = dy wᵀ, dw = xᵀ dy, db = sum of dy.

The matrix w is large (fc6: 151 MB) and the batch small, so w should pass through the cores once, in the order in which
it lies in memory, while x and dy are small enough to be laid out as each product likes best:

- y: a strip of w's columns is packed into panels, some rows at a time; these and the sums fit the second-level cache.
- dx: computed as dxᵀ = w dyᵀ. The rows of w are the left operand just as they lie; dyᵀ is packed once.
- y of a few images only is limited by reading w, and gains nothing from panels: each core reads a few hundred rows
  of w at a time, from beginning to end, and the sums over them are added up afterwards.
- dw: see ``weight_gradient.py``.

Every element is one sum in a fixed order, so the results do not depend on the number of threads. BLAS's do.

Gain: fc7 with 16 images in compiled loops 28 ms, this way 14; BLAS would take 7.6 (`python -m bench.kernels linear`,
docs/cpu.md).
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np

from net.cpu.jit import kernel, prange
from net.cpu.memory import contiguous, empty
from net.cpu.product import add_times_panels
from net.cpu.simd import BLOCK, PANEL, copy, lines, prefetch
from net.cpu.weight_gradient import ROWS, SHIFT, WeightGradient
from net.shapes import require_shape

_FEW: Final = 4  # images up to which y is computed without panels
_DEPTH: Final = 256  # rows of w at a time in y of a few images, columns in dx
_PACKED: Final = 64  # rows of w at a time in y: rows a power of two apart share a few cache lines, which more overflow
_WIDE: Final = 8  # panels of w at most at a time in y: packed rows and sums stay in a second-level cache beside x


def linear_forward(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x (N, Cin), w (Cin, Cout), b (Cout,) -> y (N, Cout); keep x for the backward pass."""
    return _forward(contiguous(x), contiguous(w), contiguous(b), relu=False)


def linear_backward(
    dy: np.ndarray, x: np.ndarray, w: np.ndarray, *, need_dx: bool = True
) -> tuple[np.ndarray | None, WeightGradient, np.ndarray]:
    """dy (N, Cout) -> dx (N, Cin) or None, dw (Cin, Cout), db (Cout,)."""
    dy, x, w = contiguous(dy), contiguous(x), contiguous(w)
    return _backward(dy, dy, x, w, False, need_dx)


def linear_block_forward(x: np.ndarray, w: np.ndarray, b: np.ndarray, *, training: bool) -> tuple[np.ndarray, Any]:
    """Linear and ReLU -> y, and what the backward pass needs."""
    x = contiguous(x)
    y = _forward(x, contiguous(w), contiguous(b), relu=True)
    return y, (x, y) if training else None


def linear_block_backward(
    dy: np.ndarray, kept: Any, w: np.ndarray, *, need_dx: bool
) -> tuple[np.ndarray | None, WeightGradient, np.ndarray]:
    """dy of the block's output -> dx or None, dw, db."""
    x, y = kept
    return _backward(contiguous(dy), y, x, contiguous(w), True, need_dx)


def _forward(x: np.ndarray, w: np.ndarray, b: np.ndarray, relu: bool) -> np.ndarray:
    if x.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"weights {w.shape} do not fit an input of shape {x.shape}")
    require_shape("b", b, (w.shape[1],))
    n, depth = x.shape
    y = empty((n, w.shape[1]))
    if n <= _FEW:
        _few_products(x, w, b, relu, empty((max(1, -(-depth // _DEPTH)), n, w.shape[1])), y)
        return y
    apart = empty((n, depth + SHIFT))
    np.copyto(apart[:, :depth], x)
    # As many strips as keep all cores busy; no sum depends on where a strip begins.
    panels, threads = -(-w.shape[1] // PANEL), numba.get_num_threads()
    strips = threads * -(-panels // (threads * _WIDE))
    _products(apart.reshape(-1), w, b, relu, -(-panels // strips) * PANEL, y)
    return y


def _backward(
    dy: np.ndarray, y: np.ndarray, x: np.ndarray, w: np.ndarray, relu: bool, need_dx: bool
) -> tuple[np.ndarray | None, WeightGradient, np.ndarray]:
    require_shape("dy", dy, (len(x), w.shape[1]))
    require_shape("x", x, (len(x), w.shape[0]))
    n, maps = dy.shape
    panels = -(-maps // PANEL)
    db = empty(maps)
    by_map, by_image = empty(panels * n * PANEL), empty(-(-n // PANEL) * maps * PANEL)
    _pack(dy, y, relu, by_map, by_image, db)
    turned = empty((x.shape[1], n + SHIFT))
    np.copyto(turned[:, :n], x.T)
    dw = WeightGradient(w.shape, turned, by_map, n)
    if not need_dx:
        return None, dw, db
    dx = empty(x.shape)
    _inputs(w.reshape(-1), by_image, maps, dx)
    return dx, dw, db


@kernel
def _products(x: np.ndarray, w: np.ndarray, b: np.ndarray, relu: bool, width: int, y: np.ndarray) -> None:
    images, maps = y.shape
    depth = w.shape[0]
    row = depth + SHIFT
    flat = w.reshape(-1)
    zero = np.float32(0)
    for strip in prange((maps + width - 1) // width):
        first = strip * width
        columns = min(width, maps - first)
        panels = (columns + PANEL - 1) // PANEL
        products = (panels + 1) // 2 * ((images + BLOCK - 1) // BLOCK)
        ahead = (_PACKED + products - 1) // products
        packed, sums = lines(panels * _PACKED * PANEL), lines(panels * images * PANEL)
        packed[:] = 0
        sums[:] = 0
        part = lines(2 * BLOCK * PANEL)
        for start in range(0, depth, _PACKED):
            now = min(_PACKED, depth - start)
            for k in range(now):
                for panel in range(columns // PANEL):
                    at, column = (panel * _PACKED + k) * PANEL, first + panel * PANEL
                    copy(PANEL, flat, (start + k) * maps + column, packed, at)
                for o in range(columns // PANEL * PANEL, columns):  # the last, narrower panel
                    packed[((panels - 1) * _PACKED + k) * PANEL + o % PANEL] = w[start + k, first + o]
            # The next rows of w are far apart in memory, where no hardware expects them: they are asked for a few at
            # a time between the products, so that packing finds them in the cache.
            following = start + _PACKED
            for panel in range(0, panels, 2):
                for i in range(0, images, BLOCK):
                    for k in range(following, min(following + ahead, depth)):
                        for o in range(0, columns, SHIFT):
                            prefetch(flat, k * maps + first + o)
                    following += ahead
                    add_times_panels(
                        x,
                        i * row + start,
                        row,
                        1,
                        packed,
                        panel * _PACKED * PANEL,
                        _PACKED * PANEL,
                        sums,
                        (panel * images + i) * PANEL,
                        PANEL,
                        images * PANEL,
                        min(BLOCK, images - i),
                        min(2, panels - panel),
                        now,
                        part,
                    )
        for n in range(images):
            for panel in range(panels):
                at, column = (panel * images + n) * PANEL, first + panel * PANEL
                for o in range(min(PANEL, columns - panel * PANEL)):
                    v = sums[at + o] + b[column + o]
                    y[n, column + o] = zero if relu and v < zero else v


@kernel
def _few_products(x: np.ndarray, w: np.ndarray, b: np.ndarray, relu: bool, parts: np.ndarray, y: np.ndarray) -> None:
    """``parts`` (depth / _DEPTH, images, maps): a sum of thousands of terms in one chain would round several times
    worse than one of parts; and parts are what cores can share without any one's order depending on their number.
    """
    images, maps = y.shape
    depth = x.shape[1]
    zero = np.float32(0)
    for task in prange(parts.shape[0]):
        part = parts[task]
        part[:] = 0
        start, end = task * _DEPTH, min((task + 1) * _DEPTH, depth)
        fours = start + (end - start) // 4 * 4
        # Four rows at a time: memory answers several requests at once, and the sums are fetched less often.
        for k in range(start, fours, 4):
            row0, row1, row2, row3 = w[k], w[k + 1], w[k + 2], w[k + 3]
            for n in range(images):
                x0, x1, x2, x3 = x[n, k], x[n, k + 1], x[n, k + 2], x[n, k + 3]
                for o in range(maps):
                    part[n, o] += x0 * row0[o] + x1 * row1[o] + x2 * row2[o] + x3 * row3[o]
        for k in range(fours, end):
            row = w[k]
            for n in range(images):
                factor = x[n, k]
                for o in range(maps):
                    part[n, o] += factor * row[o]
    for n in range(images):
        for part in range(1, parts.shape[0]):
            for o in range(maps):
                parts[0, n, o] += parts[part, n, o]
        for o in range(maps):
            v = parts[0, n, o] + b[o]
            y[n, o] = zero if relu and v < zero else v


@kernel
def _pack(dy: np.ndarray, y: np.ndarray, relu: bool, by_map: np.ndarray, by_image: np.ndarray, db: np.ndarray) -> None:
    """dy, where ReLU let it through, as panels of maps [panel][image] and of images [panel][map]; and its sums."""
    images, maps = dy.shape
    zero = np.float32(0)
    image_panels = (images + PANEL - 1) // PANEL
    for panel in prange((maps + PANEL - 1) // PANEL):
        first = panel * PANEL
        sums = np.zeros(PANEL, np.float32)
        for n in range(image_panels * PANEL):
            for o in range(PANEL):
                v = zero
                if n < images and first + o < maps and (y[n, first + o] > zero or not relu):
                    v = dy[n, first + o]
                if n < images:
                    by_map[(panel * images + n) * PANEL + o] = v
                if first + o < maps:
                    by_image[(n // PANEL * maps + first + o) * PANEL + n % PANEL] = v
                sums[o] += v
        for o in range(min(PANEL, maps - first)):
            db[first + o] = sums[o]


@kernel
def _inputs(w: np.ndarray, dy: np.ndarray, maps: int, dx: np.ndarray) -> None:
    """dx from w and dy in panels of images."""
    images, depth = dx.shape
    panels = (images + PANEL - 1) // PANEL
    for block in prange((depth + ROWS - 1) // ROWS):
        first = block * ROWS
        rows = min(ROWS, depth - first)
        sums, part = lines(panels * ROWS * PANEL), lines(2 * BLOCK * PANEL)
        sums[:] = 0
        for start in range(0, maps, _DEPTH):
            now = min(_DEPTH, maps - start)
            for i in range(0, rows, BLOCK):
                add_times_panels(
                    w,
                    (first + i) * maps + start,
                    maps,
                    1,
                    dy,
                    start * PANEL,
                    maps * PANEL,
                    sums,
                    i * PANEL,
                    PANEL,
                    ROWS * PANEL,
                    min(BLOCK, rows - i),
                    panels,
                    now,
                    part,
                )
        for n in range(images):
            for i in range(rows):
                dx[n, first + i] = sums[(n // PANEL * ROWS + i) * PANEL + n % PANEL]
