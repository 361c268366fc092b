"""What follows a convolution, in one pass each way: bias + ReLU [+ LRN] [+ max pool], and all of it backward.

Forward, row by row of one image::

    y      = max(conv + b, 0)                 kept for the backward pass
    z      = y s^-beta,  s = k + alpha * (sum of y² over the window of channels)
    pooled = maximum of z over size x size pixels, and its place in the window

Backward, pixel by pixel::

    dz = sum of dpooled over the windows this pixel won
    dy = dz s^-beta - 2 alpha beta y * sum_window (dz y s^(-beta - 1))
    d(conv) = dy where y > 0, else 0                    db = its sum over images and pixels

Each step is that of ``relu.py``, ``lrn.py`` and ``pool.py``; what is gained is memory traffic. As separate operations
they read and write the convolution's output (conv1: 149 MB a batch) seven times forward; here it is written once,
while z lives in a ring of as many rows as the pool is high. s is not kept: computing it again costs less than reading.

Gain: conv1's of 16 images in NumPy 56 ms, a kernel for each operation 14, one pass 7.1 (`python -m bench.kernels
finish`, docs/cpu.md).
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from net.cpu.jit import inner, kernel, prange
from net.cpu.lrn import denormalise, normalise, scales
from net.cpu.memory import empty
from net.cpu.pool import pool_row, unpool_row
from net.shapes import windows


class Finish(NamedTuple):
    """What follows the convolution."""

    relu: bool
    half: int  # channels of the LRN's window to either side; -1 without LRN
    k: np.float32
    alpha: np.float32
    beta: np.float32
    size: int  # of the pool's windows; 0 without pool
    stride: int

    @property
    def in_place(self) -> bool:
        """Whether y itself is the result."""
        return self.half < 0 and self.size == 0


NOTHING = Finish(False, -1, np.float32(0), np.float32(0), np.float32(0), 0, 1)


def block(lrn: tuple[int, float, float, float] | None, pool: tuple[int, int] | None) -> Finish:
    """ReLU, then LRN (size, k, alpha, beta) and pool (size, stride) where they are not None."""
    size, k, alpha, beta = lrn or (-1, 0.0, 0.0, 0.0)
    return Finish(True, size // 2, np.float32(k), np.float32(alpha), np.float32(beta), *(pool or (0, 1)))


class Results(NamedTuple):
    """Where the forward pass writes; arrays that a block does not have are empty."""

    y: np.ndarray  # (N, OH, OW, maps), or as many images as there are cores where y is not kept
    out: np.ndarray  # the block's output
    winner: np.ndarray
    ring: np.ndarray  # (cores, pool rows, OW, maps) normalised rows


def results(shape: tuple[int, int, int, int], finish: Finish, keep: bool) -> Results:
    """Arrays for outputs of ``shape``; ``keep`` says whether the backward pass will want y."""
    n, oh, ow, maps = shape
    cores = numba.get_num_threads()
    y = empty(shape if keep or finish.in_place else (cores, oh, ow, maps))
    none = (0, 0, 0, 0)
    if finish.size == 0:
        out = empty(none if finish.in_place else shape)
        return Results(y, out, empty(none, np.uint8), empty(none))
    pool_shape = (n, windows(oh, finish.size, finish.stride), windows(ow, finish.size, finish.stride), maps)
    ring = empty((cores, finish.size, ow, maps) if finish.half >= 0 else none)
    return Results(y, empty(pool_shape), empty(pool_shape, np.uint8), ring)


@inner
def finish_image(
    source: np.ndarray, top: int, left: int, bias: np.ndarray, finish: Finish, to: Results, image: int, task: int
) -> None:
    """Bias, ReLU, LRN and pool of one image.

    The convolution's output lies in ``source`` (rows, columns, groups, at least as many maps as a group has), from
    ``top`` and ``left`` on. It may be y itself.
    """
    kept = len(to.out) == 0 or len(to.y) == len(to.out)
    y = to.y[np.intp(image) if kept else np.intp(task)]
    height, width, maps = y.shape
    groups = source.shape[2]
    each = maps // groups
    y_groups, bias_groups = y.reshape(height, width, groups, each), bias.reshape(groups, each)
    zero = np.float32(0)
    half, size = finish.half, finish.size
    squares = np.zeros(maps + 2 * max(half, 0), np.float32)
    s = np.empty((width, maps) if half >= 0 else (0, 0), np.float32)
    best = np.empty(maps, np.int32)
    for r in range(height):
        for q in range(width):
            for g in range(groups):
                for a in range(each):
                    v = source[top + r, left + q, g, a] + bias_groups[g, a]
                    y_groups[r, q, g, a] = zero if finish.relu and v < zero else v
        if half >= 0:
            z = to.ring[task, r % size] if size > 0 else to.out[image, r]
            normalise(y[r], half, finish.k, finish.alpha, finish.beta, squares, s, z)
        first = r - size + 1
        if size > 0 and first >= 0 and first % finish.stride == 0:
            to_row = first // finish.stride
            rows = to.ring[task] if half >= 0 else y
            pool_row(rows, first, size, finish.stride, best, to.out[image, to_row], to.winner[image, to_row])


@kernel
def finish_all(source: np.ndarray, bias: np.ndarray, finish: Finish, to: Results, tasks: int) -> None:
    """Bias, ReLU, LRN and pool of a whole batch whose convolution is in ``source`` (N, OH, OW, maps)."""
    images, height, width, maps = source.shape
    for task in prange(tasks):
        for n in range(task, images, tasks):
            finish_image(source[n].reshape(height, width, 1, maps), 0, 0, bias, finish, to, n, task)


def unfinish(dy: np.ndarray, y: np.ndarray, winner: np.ndarray, finish: Finish) -> tuple[np.ndarray, np.ndarray]:
    """From dy of a block's output to d(conv) (N, OH, OW, maps) and db (maps,).

    Where y is the block's own and not its result, d(conv) takes its place in memory.
    """
    d = empty(y.shape) if finish.in_place else y
    db, part = empty(y.shape[3]), empty((y.shape[0], y.shape[3]))
    _unfinish(dy, y, winner, finish, np.float32(2 * finish.alpha * finish.beta), d, part)
    np.sum(part, axis=0, out=db)
    return d, db


@kernel
def _unfinish(
    dy: np.ndarray,
    y: np.ndarray,
    winner: np.ndarray,
    finish: Finish,
    factor: np.float32,
    d: np.ndarray,
    part: np.ndarray,
) -> None:
    images, height, width, maps = y.shape
    half = finish.half
    zero = np.float32(0)
    for n in prange(images):
        squares = np.zeros(maps + 2 * max(half, 0), np.float32)
        products = np.zeros(maps + 2 * max(half, 0), np.float32)
        s = np.empty((width, maps) if half >= 0 else (0, 0), np.float32)
        power = np.empty(maps, np.float32)
        image_sum = np.zeros(maps, np.float32)
        row_sum = np.empty(maps, np.float32)
        # Two rows besides those of y and d: a loop that writes what another of its arrays may be is not vector code.
        row, through = np.empty((width, maps), np.float32), np.empty((width, maps), np.float32)
        for r in range(height):
            y_row, d_row = y[n, r], d[n, r]
            if finish.size > 0:
                unpool_row(dy[n], winner[n], r, finish.size, finish.stride, row)
            else:  # a loop, because assigning a slice compiles the text of an error about its shape, for seconds
                dy_row = dy[n, r]
                for q in range(width):
                    for a in range(maps):
                        row[q, a] = dy_row[q, a]
            if half >= 0:
                scales(y_row, half, finish.k, finish.alpha, squares, s)
                denormalise(row, y_row, s, half, factor, finish.beta, products, power, through)
                row, through = through, row
            row_sum[:] = 0
            for q in range(width):
                for a in range(maps):
                    v = row[q, a] if y_row[q, a] > zero or not finish.relu else zero
                    row[q, a] = v
                    row_sum[a] += v
            for q in range(width):
                for a in range(maps):
                    d_row[q, a] = row[q, a]
            for a in range(maps):
                image_sum[a] += row_sum[a]
        for a in range(maps):
            part[n, a] = image_sum[a]
