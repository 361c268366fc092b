"""The loops of preprocessing that are compiled: Pillow's resampling on the kept part of a picture, and colour sums.

Integers decide every byte, so the result is the same on every machine. Numba caches the compiled code beside this file.
"""

from __future__ import annotations

from typing import Final

import numba
import numpy as np

BICUBIC: Final = 0
BILINEAR: Final = 1
BOX: Final = 2

Weights = tuple[np.ndarray, np.ndarray, np.ndarray]

_BITS: Final = 22  # of a weight's fraction: Pillow's PRECISION_BITS, 32 - 8 - 2
_HALF: Final = 1 << (_BITS - 1)

# Plain arithmetic, no fast maths: the weights must be those of Pillow's C code to the last bit.
_compiled = numba.njit(cache=True, nogil=True, error_model="numpy")


@_compiled
def weights(inside: int, outside: int, first: int, count: int, kind: int) -> Weights:
    """How ``count`` samples from number ``first`` on, of a line of ``inside`` resized to ``outside``, are made.

    Sample i is sum over k of weight[i, k] * line[start[i] + k]. Returns start int64 (count,), taps int64 (count,) and
    weight int32 (count, most taps), a fixed-point number with 22 bits behind the point. Source:
    ``precompute_coeffs`` and ``normalize_coeffs_8bpc`` of Pillow's src/libImaging/Resample.c; bicubic has a = -1/2.
    """
    scale = inside / outside
    stretch = max(scale, 1.0)
    support = stretch * (2.0 if kind == 0 else (1.0 if kind == 1 else 0.5))
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
            if kind == 0:
                if away < 1.0:
                    value[k] = (1.5 * away - 2.5) * away * away + 1.0
                elif away < 2.0:
                    value[k] = (((away - 5.0) * away + 8.0) * away - 4.0) * -0.5
                else:
                    value[k] = 0.0
            elif kind == 1:
                value[k] = max(1.0 - away, 0.0)
            else:
                value[k] = 1.0 if -0.5 < x <= 0.5 else 0.0
            total += value[k]
        for k in range(taps[i]):
            share = value[k] / total if total != 0.0 else value[k]
            weight[i, k] = int(share * (1 << 22) + (0.5 if share >= 0.0 else -0.5))
    return start, taps, weight


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


@_compiled
def without_fourth(pixels: np.ndarray) -> np.ndarray:
    """The first three of each pixel's four bytes: uint8 (h, w, 3) from (h, w, 4)."""
    out = np.empty((pixels.shape[0], pixels.shape[1], 3), np.uint8)
    for y in range(pixels.shape[0]):
        source, row = pixels[y], out[y]
        for x in range(pixels.shape[1]):
            row[x, 0] = source[x, 0]
            row[x, 1] = source[x, 1]
            row[x, 2] = source[x, 2]
    return out


@_compiled
def add_colours(image: np.ndarray, picture: np.ndarray, products: np.ndarray) -> None:
    """Add ``image`` uint8 (h, w, 3) to ``picture`` uint32 (h, w, 3), and to ``products`` int64 (6,) its sums of
    rr, rg, rb, gg, gb and bb."""
    for y in range(image.shape[0]):
        # A row of 4,096 pixels sums to less than 2^29: 32 bits hold it, and twice as many fit into a vector.
        rr, rg, rb, gg, gb, bb = np.int32(0), np.int32(0), np.int32(0), np.int32(0), np.int32(0), np.int32(0)
        row, sums = image[y], picture[y]
        for x in range(image.shape[1]):
            r, g, b = np.int32(row[x, 0]), np.int32(row[x, 1]), np.int32(row[x, 2])
            rr = np.int32(rr + r * r)
            rg = np.int32(rg + r * g)
            rb = np.int32(rb + r * b)
            gg = np.int32(gg + g * g)
            gb = np.int32(gb + g * b)
            bb = np.int32(bb + b * b)
            sums[x, 0] += np.uint32(row[x, 0])
            sums[x, 1] += np.uint32(row[x, 1])
            sums[x, 2] += np.uint32(row[x, 2])
        products[0] += rr
        products[1] += rg
        products[2] += rb
        products[3] += gg
        products[4] += gb
        products[5] += bb
