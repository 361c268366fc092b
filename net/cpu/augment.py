"""From stored uint8 crops to the network's input: y = (pixel - mean + shift) * scale, mirrored, with a zero border.

The rules for the mean picture and the mirror are in ``net/reference/augment.py``. Everything happens in one pass: each
byte is read once and each float written once. A row is handled as one run of 3 W numbers, whose arithmetic goes
through vector instructions; only turning it round moves pixels one by one.

Gain: 67 to 15 ms (128 crops, `python -m bench.cpu_small`, docs/cpu.md).
"""

from __future__ import annotations

import numpy as np

from net.cpu.jit import inner, kernel, prange
from net.cpu.memory import contiguous, empty
from net.shapes import require_shape


def augment(
    images: np.ndarray,
    corner: np.ndarray,
    flip: np.ndarray,
    shift: np.ndarray,
    *,
    mean: np.ndarray | None,
    scale: float,
    bgr: bool,
    border: tuple[int, int],
) -> np.ndarray:
    """Crops uint8 (N, H, W, 3) and their draws -> input float32 (N, before + H + after, before + W + after, 3)."""
    images = contiguous(images, np.uint8)
    n, height, width, _ = images.shape
    for name, array, wanted in (("corner", corner, (n, 2)), ("flip", flip, (n,)), ("shift", shift, (n, 3))):
        require_shape(name, array, wanted)
    before, after = border
    y = empty((n, before + height + after, before + width + after, 3))
    corner = contiguous(corner, np.int32)
    if mean is None:
        mean = empty((0, 0, 3))
    elif (
        len(mean) != height
        and n
        and (corner.min() < 0 or (corner.max(axis=0) > np.subtract(mean.shape[:2], (height, width))).any())
    ):
        raise ValueError("a crop reaches beyond the mean picture")
    _augment(
        images.reshape(n, height, 3 * width),
        corner,
        contiguous(flip, np.uint8),
        contiguous(shift),
        contiguous(mean).reshape(len(mean), 3 * mean.shape[1]),
        np.float32(scale),
        bgr,
        before,
        y.reshape(n, y.shape[1], 3 * y.shape[2]),
    )
    return y


@inner
def _turn(source: np.ndarray, mirror: bool, bgr: bool, to: np.ndarray) -> None:
    """Pixels of a row (W, 3), as a flat array, in the other direction and with their channels in the other order."""
    width = to.size // 3
    for c in range(width):
        at = 3 * (width - 1 - c if mirror else c)
        for ch in range(3):
            to[3 * c + ch] = source[at + (2 - ch if bgr else ch)]


@kernel
def _augment(
    images: np.ndarray,
    corner: np.ndarray,
    flip: np.ndarray,
    shift: np.ndarray,
    mean: np.ndarray,
    scale: np.float32,
    bgr: bool,
    before: int,
    y: np.ndarray,
) -> None:
    batch, height, row_size = images.shape
    rows = y.shape[1]
    fixed = mean.shape[0] == height  # a mean of the crop's size does not move with the crop
    moving = mean.shape[0] > 0 and not fixed
    for task in prange(batch * rows):
        n, row = task // rows, task % rows
        r = row - before
        to = y[n, row]
        if r < 0 or r >= height:
            to[:] = 0
            continue
        to[: 3 * before] = 0
        to[3 * before + row_size :] = 0
        to = to[3 * before : 3 * before + row_size]
        values = np.empty(row_size, np.float32)
        if moving:
            means = mean[corner[n, 0] + r, 3 * corner[n, 1] :]
            for i in range(row_size):
                values[i] = np.float32(images[n, r, i]) - means[i]
        else:
            for i in range(row_size):
                values[i] = np.float32(images[n, r, i])
        if flip[n]:
            turned = np.empty(row_size, np.float32)
            _turn(values, True, False, turned)
            values = turned
        if fixed:
            for i in range(row_size):
                values[i] -= mean[r, i]
        shifts = np.empty(row_size, np.float32)
        for c in range(row_size // 3):
            for ch in range(3):
                shifts[3 * c + ch] = shift[n, ch]
        for i in range(row_size):
            values[i] = (values[i] + shifts[i]) * scale
        _turn(values, False, bgr, to)
