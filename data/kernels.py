"""The loops of the data path that are compiled: Pillow's resampling on the kept part of a picture, colour sums, and
copying crops.

Integers decide every byte, so the result is the same on every machine. Numba caches the compiled code beside this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BICUBIC: Final = 0
BILINEAR: Final = 1
BOX: Final = 2

Weights = tuple[np.ndarray, np.ndarray, np.ndarray]

_BITS: Final = 22  # of a weight's fraction: Pillow's PRECISION_BITS, 32 - 8 - 2
_HALF: Final = 1 << (_BITS - 1)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Plain arithmetic, no fast maths: the weights must be those of Pillow's C code to the last bit.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache can be written: each process compiles, which takes some seconds
        return numba.njit(**options)(function)


@_compiled
def weights(inside: int, outside: int, first: int, count: int, kind: int) -> Weights:
    """How ``count`` samples from number ``first`` on, of a line of ``inside`` resized to ``outside``, are made.

    Sample i is sum over k of weight[i, k] * line[start[i] + k]. Returns start int64 (count,), taps int64 (count,) and
    weight int32 (count, most taps), a fixed-point number with 22 bits behind the point. Source:
    ``precompute_coeffs`` and ``normalize_coeffs_8bpc`` of Pillow's src/libImaging/Resample.c; bicubic has a = -1/2.
    """
    scale = inside / outside
    stretch = max(scale, 1.0)
    support = stretch * (2.0 if kind == BICUBIC else (1.0 if kind == BILINEAR else 0.5))
    most = int(np.ceil(support)) * 2 + 1
    start = np.empty(count, np.int64)
    taps = np.empty(count, np.int64)
    weight = np.zeros((count, most), np.int32)
    value = np.empty(most, np.float64)
    inverse = 1.0 / stretch
    for i in range(count):
        centre = (first + i + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        taps[i] = min(int(centre + support + 0.5), inside) - low
        start[i] = low
        total = 0.0
        for k in range(taps[i]):
            x = (k + low - centre + 0.5) * inverse
            away = abs(x)
            if kind == BICUBIC:
                if away < 1.0:
                    value[k] = (1.5 * away - 2.5) * away * away + 1.0
                elif away < 2.0:
                    value[k] = (((away - 5.0) * away + 8.0) * away - 4.0) * -0.5
                else:
                    value[k] = 0.0
            elif kind == BILINEAR:
                value[k] = max(1.0 - away, 0.0)
            else:
                value[k] = 1.0 if -0.5 < x <= 0.5 else 0.0
            total += value[k]
        for k in range(taps[i]):
            share = value[k] / total if total != 0.0 else value[k]
            weight[i, k] = int(share * (1 << _BITS) + (0.5 if share >= 0.0 else -0.5))
    return start, taps, weight


@intrinsic
def _turn_four(_context: Any, source: Any, step: Any, to: Any, to_step: Any) -> tuple[Any, Callable[..., Any]]:
    """The 4x4 pixels at address ``source``, rows ``step`` bytes apart, with rows and columns exchanged to ``to``."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.IntType(32), 4)
        source, step, to, to_step = arguments

        def place(address: Any, step: Any, row: int) -> Any:
            moved = builder.add(address, builder.mul(step, ir.Constant(step.type, row)))
            return builder.inttoptr(moved, vector.as_pointer())

        def shuffled(a: Any, b: Any, *lanes: int) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), 4), list(lanes)))

        a, b, c, d = (builder.load(place(source, step, row), align=1) for row in range(4))
        ab, cd = shuffled(a, b, 0, 4, 1, 5), shuffled(c, d, 0, 4, 1, 5)
        later_ab, later_cd = shuffled(a, b, 2, 6, 3, 7), shuffled(c, d, 2, 6, 3, 7)
        turned = (
            shuffled(ab, cd, 0, 1, 4, 5),
            shuffled(ab, cd, 2, 3, 6, 7),
            shuffled(later_ab, later_cd, 0, 1, 4, 5),
            shuffled(later_ab, later_cd, 2, 3, 6, 7),
        )
        for row, value in enumerate(turned):
            builder.store(value, place(to, to_step, row), align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64, types.uint64), generate


@_compiled
def turned(pixels: np.ndarray, out: np.ndarray) -> None:
    """Rows become columns: uint32 (h, w) with contiguous rows into ``out`` uint32 (w, h), contiguous.

    Four by four pixels are turned in registers, a cache line of each row before the next rows are begun.
    """
    high, wide = pixels.shape
    if pixels.strides[1] != 4 or pixels.strides[0] < 0 or out.shape != (wide, high):
        raise ValueError("turned: wrong layout")
    source, step = np.uint64(pixels.ctypes.data), np.uint64(pixels.strides[0])
    to, to_step = np.uint64(out.ctypes.data), np.uint64(high * 4)
    whole_high, whole_wide = high // 4 * 4, wide // 4 * 4
    for left in range(0, whole_wide, 16):
        for top in range(0, whole_high, 4):
            for x in range(left, min(left + 16, whole_wide), 4):
                here = source + np.uint64(top) * step + np.uint64(x * 4)
                _turn_four(here, step, to + np.uint64(x) * to_step + np.uint64(top * 4), to_step)
    for y in range(high):
        for x in range(whole_wide if y < whole_high else 0, wide):
            out[x, y] = pixels[y, x]


@_compiled
def combine(lines: np.ndarray, start: np.ndarray, taps: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """Weighted sums of whole lines: out[i] = sum over k of weight[i, k] * lines[start[i] + k], rounded, 0..255.

    ``lines`` uint8 (n, m), ``out`` uint8 (len(start), m). The inner loop runs along a line, which makes it vector code.
    """
    total = np.empty(lines.shape[1], np.int32)
    for i in range(len(start)):
        total[:] = _HALF
        for k in range(taps[i]):
            w = weight[i, k]
            line = lines[start[i] + k]
            for j in range(len(total)):
                total[j] += w * np.int32(line[j])
        row = out[i]
        for j in range(len(total)):
            row[j] = min(max(total[j] >> _BITS, 0), 255)


@intrinsic
def _three_of_four(_context: Any, source: Any, to: Any) -> tuple[Any, Callable[..., Any]]:
    """Four pixels of four bytes at address ``source`` as three bytes each at ``to``; 16 bytes there are written."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), 16)
        pixels = builder.load(builder.inttoptr(arguments[0], vector.as_pointer()), align=1)
        kept = [lane for lane in range(16) if lane % 4 < 3]
        mask = ir.Constant(ir.VectorType(ir.IntType(32), 16), [*kept, 15, 15, 15, 15])
        builder.store(
            builder.shuffle_vector(pixels, pixels, mask), builder.inttoptr(arguments[1], vector.as_pointer()), 1
        )
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), generate


@_compiled
def without_fourth(pixels: np.ndarray) -> np.ndarray:
    """The first three of each pixel's four bytes: uint8 (h, w, 3) from (h, w, 4), contiguous."""
    high, wide, depth = pixels.shape
    if depth != 4 or not pixels.flags.c_contiguous:
        raise ValueError("without_fourth: wrong layout")
    out = np.empty((high, wide, 3), np.uint8)
    source, to, count = np.uint64(pixels.ctypes.data), np.uint64(out.ctypes.data), high * wide
    # Each store writes four bytes too many, which the next one overwrites; the last pixels are copied one by one.
    fast = max((count - 2) // 4, 0)
    for i in range(fast):
        _three_of_four(source + np.uint64(16 * i), to + np.uint64(12 * i))
    rest, last = pixels.reshape(count, 4), out.reshape(count, 3)
    for i in range(4 * fast, count):
        for channel in range(3):
            last[i, channel] = rest[i, channel]
    return out


@_compiled
def add_colours(image: np.ndarray, picture: np.ndarray, products: np.ndarray) -> None:
    """Add ``image`` uint8 (h, w, 3) to ``picture`` uint32 (h, w, 3), and to ``products`` int64 (6,) its sums of
    rr, rg, rb, gg, gb and bb. Both are contiguous.

    Each byte of a row is multiplied by itself, its neighbour and the one after that, whatever their colours: that is
    vector code, which picking the colours apart is not. Column sums are kept, and only the six wanted thirds of them
    added up: for 65,536 pixels 30 instead of 167 microseconds (AMD Zen 4).
    """
    count = image.shape[1] * 3
    rows, sums = image.reshape(image.shape[0], count), picture.reshape(image.shape[0], count)
    # A column of 4,096 products is less than 2^29: 32 bits hold it, and twice as many fit into a vector.
    itself, neighbour, next_but_one = np.zeros(count, np.int32), np.zeros(count, np.int32), np.zeros(count, np.int32)
    paired = len(rows) // 2 * 2
    for y in range(0, paired, 2):
        a, b = rows[y], rows[y + 1]
        for j in range(count):
            itself[j] += np.int32(a[j]) * np.int32(a[j]) + np.int32(b[j]) * np.int32(b[j])
        for j in range(count - 1):
            neighbour[j] += np.int32(a[j]) * np.int32(a[j + 1]) + np.int32(b[j]) * np.int32(b[j + 1])
        for j in range(count - 2):
            next_but_one[j] += np.int32(a[j]) * np.int32(a[j + 2]) + np.int32(b[j]) * np.int32(b[j + 2])
    for y in range(paired, len(rows)):
        a = rows[y]
        for j in range(count - 2):
            neighbour[j] += np.int32(a[j]) * np.int32(a[j + 1])
            next_but_one[j] += np.int32(a[j]) * np.int32(a[j + 2])
        neighbour[count - 2] += np.int32(a[count - 2]) * np.int32(a[count - 1])
        for j in range(count):
            itself[j] += np.int32(a[j]) * np.int32(a[j])
    for y in range(len(rows)):
        total, row = sums[y], rows[y]
        for j in range(count):
            total[j] += np.uint32(row[j])
    for j in range(0, count, 3):
        products[0] += itself[j]
        products[1] += neighbour[j]
        products[2] += next_but_one[j]
        products[3] += itself[j + 1]
        products[4] += neighbour[j + 1]
        products[5] += itself[j + 2]


_STREAMED: Final = 32  # bytes a streaming store writes; a processor without such wide registers takes two


@intrinsic
def _copy(_context: Any, to: Any, source: Any, count: Any) -> tuple[Any, Callable[..., Any]]:
    """``count`` bytes from address ``source`` to address ``to``: C's memcpy, which Numba has no name for."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        places = [builder.inttoptr(address, byte) for address in arguments[:2]]
        cgutils.raw_memcpy(builder, *places, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.int64), generate


@intrinsic
def _stream(_context: Any, to: Any, source: Any) -> tuple[Any, Callable[..., Any]]:
    """32 bytes from address ``source`` to the aligned address ``to``, past the caches."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.IntType(32), _STREAMED // 4).as_pointer()
        value = builder.load(builder.inttoptr(arguments[1], vector), align=1)
        store = builder.store(value, builder.inttoptr(arguments[0], vector), align=_STREAMED)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), generate


@intrinsic
def _fence(_context: Any) -> tuple[Any, Callable[..., Any]]:
    """Nothing after it, in any thread that is told, sees memory as it was before the stores above it."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@_compiled
def copy_crops(address: np.ndarray, corner: np.ndarray, size: int, out: np.ndarray) -> None:
    """Copy a square out of each picture.

    ``address`` uint64 (N,) is where each picture, uint8 (size, size, 3) and contiguous, begins in memory; ``corner``
    int32 (N, 2) the square's upper left pixel; ``out`` uint8 (N, crop, crop, 3), contiguous. Nothing is checked here.

    A plain store first reads the line it is about to fill. Streaming stores do not: 89,000 crops a second with one
    thread, 47,000 with plain ones (AMD Zen 4). They pay only where they fill whole aligned pieces, as rows of 224
    pixels do in an aligned buffer; others, 227 pixels among them, are copied plainly.
    """
    crop = out.shape[1]
    row = np.uint64(crop * 3)
    to = np.uint64(out.ctypes.data)
    streamed = to % np.uint64(_STREAMED) == 0 and row % np.uint64(_STREAMED) == 0
    for i in range(len(address)):
        source = address[i] + np.uint64((corner[i, 0] * size + corner[i, 1]) * 3)
        for _ in range(crop):
            if streamed:
                for k in range(0, crop * 3, _STREAMED):
                    _stream(to + np.uint64(k), source + np.uint64(k))
            else:
                _copy(to, source, crop * 3)
            to += row
            source += np.uint64(size * 3)
    _fence()
