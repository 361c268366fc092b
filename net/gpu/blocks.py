"""Layers that belong together, computed together.

A convolution's result is read once by one kernel that adds the bias, rectifies, normalises and pools
(``relu_lrn_pool.cu``), and once more by the matching kernel on the way back, which recomputes what it needs instead of
having it stored: between the two only the raw result and each window's winner are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from net.gpu.arrays import cast, empty, floats, pictures
from net.gpu.convolution import (
    add_bias,
    column_sum,
    input_gradient,
    operands,
    product,
    rectified,
    sum_parts,
    weight_gradient,
)
from net.gpu.kernels import THREADS, launch
from net.gpu.layers import relu_backward
from net.gpu.linear import matrices, multiply, weight_and_input_gradient
from net.gpu.shape import ConvShape, shape_of
from net.layers import Array
from net.shapes import require_shape, windows

Lrn = tuple[int, float, float, float]  # size, k, alpha, beta
Pool = tuple[int, int]  # size, stride

TILE_MEMORY: Final = 40 * 1024  # bytes of shared memory a block of the forward kernel may use; five blocks an SM
BACKWARD_BLOCKS: Final = 1024  # at most; each leaves one row of partial sums of db


@dataclass(frozen=True)
class KeptByConv:
    """What a convolution block keeps for its backward pass."""

    x: Array  # as the products take it
    weights: Array  # as a matrix, in the products' type
    columns: Array | None  # None: made again, or not needed
    result: Array  # of the convolution, before the bias; or the block's output where neither LRN nor pool follows
    bias: Array | None
    winner: Array | None
    shape: ConvShape


def conv_block_forward(
    x: Array,
    w: Array,
    b: Array,
    *,
    stride: int,
    pad: int,
    groups: int,
    lrn: Lrn | None,
    pool: Pool | None,
    training: bool,
) -> tuple[Array, KeptByConv | None]:
    """Convolution, bias, ReLU [, LRN] [, max pool]: x (N, H, W, Cin) -> y, and what backward needs."""
    if lrn is not None or pool is not None:
        return _forward(x, w, b, shape_of(x, w, stride, pad, groups), lrn, pool, training, relu_last=False)
    shape = shape_of(x, w, stride, pad, groups)
    x, weights = operands(x, w, shape)
    y, columns = rectified(x, weights, b, shape, keep_columns=training)
    return y, KeptByConv(x, weights, columns, y, None, None, shape) if training else None


def conv_block_backward(
    dy: Array,
    kept: KeptByConv,
    w: Array,
    *,
    stride: int,
    pad: int,
    groups: int,
    lrn: Lrn | None,
    pool: Pool | None,
    need_dx: bool,
) -> tuple[Array | None, Array, Array]:
    """dy -> dx (or None), dw, db. The weights are those of the forward pass, already in the products' type."""
    return _backward(dy, kept, w, lrn, pool, need_dx, relu_last=False)


def conv_block_relu_last_forward(
    x: Array,
    w: Array,
    b: Array,
    *,
    stride: int,
    pad: int,
    groups: int,
    lrn: Lrn | None,
    pool: Pool | None,
    training: bool,
) -> tuple[Array, KeptByConv | None]:
    """Convolution, bias [, LRN] [, max pool], ReLU, the order of block 1 in the authors' code."""
    return _forward(x, w, b, shape_of(x, w, stride, pad, groups), lrn, pool, training, relu_last=True)


def conv_block_relu_last_backward(
    dy: Array,
    kept: KeptByConv,
    w: Array,
    *,
    stride: int,
    pad: int,
    groups: int,
    lrn: Lrn | None,
    pool: Pool | None,
    need_dx: bool,
) -> tuple[Array | None, Array, Array]:
    """dy -> dx (or None), dw, db, as :func:`conv_block_backward`."""
    return _backward(dy, kept, w, lrn, pool, need_dx, relu_last=True)


def _forward(
    x: Array,
    w: Array,
    b: Array,
    shape: ConvShape,
    lrn: Lrn | None,
    pool: Pool | None,
    training: bool,
    *,
    relu_last: bool,
) -> tuple[Array, KeptByConv | None]:
    require_shape("b", b, (shape.maps,))
    x, weights = operands(x, w, shape)
    c, columns = product(x, weights, shape, keep_columns=training)
    bias = floats(b)
    y, winner = _finish(c, bias, lrn, pool, training, relu_last)
    return y, KeptByConv(x, weights, columns, c, bias, winner, shape) if training else None


def _backward(
    dy: Array, kept: KeptByConv, w: Array, lrn: Lrn | None, pool: Pool | None, need_dx: bool, *, relu_last: bool
) -> tuple[Array | None, Array, Array]:
    require_shape("dy", dy, (kept.result if kept.winner is None else kept.winner).shape)
    dc, db = _finish_backward(pictures(dy), kept.winner, kept.result, kept.bias, lrn, pool, relu_last)
    dw = weight_gradient(dc, kept.x, kept.columns, kept.shape)
    return (input_gradient(dc, w, kept.weights, kept.shape) if need_dx else None), dw, db


def linear_block_forward(x: Array, w: Array, b: Array, *, training: bool) -> tuple[Array, Any]:
    """Fully connected layer and ReLU: x (N, D) -> y (N, K) float32, and what backward needs."""
    x, weights = matrices(x, w)
    y = multiply(x, weights)
    add_bias(y, b, rectify=True)
    return y, (x, weights, y) if training else None


def linear_block_backward(
    dy: Array, kept: tuple[Array, Array, Array], w: Array, *, need_dx: bool
) -> tuple[Array | None, Array, Array]:
    """dy (N, K) -> dx (N, D) or None, dw, db."""
    x, weights, y = kept
    dz = relu_backward(floats(dy), y)
    dx, dw = weight_and_input_gradient(cast(dz, x.dtype), x, weights, need_dx)
    return dx, dw, column_sum(dz)


def _finish(
    c: Array, bias: Array, lrn: Lrn | None, pool: Pool | None, training: bool, relu_last: bool
) -> tuple[Array, Array | None]:
    """What follows a convolution: y and each window's winner."""
    images, height, width, channels = c.shape
    size, stride = pool or (1, 1)
    out_height, out_width = windows(height, size, stride), windows(width, size, stride)
    y = empty((images, out_height, out_width, channels), c.dtype)
    winner = empty(y.shape, "uint8") if training and pool else None
    _, block, each = _threads(channels, lrn)
    rows, columns = tile(out_height, out_width, size, stride, channels)
    down, right = -(-out_height // rows), -(-out_width // columns)
    pixels = ((rows - 1) * stride + size) * ((columns - 1) * stride + size)
    launch(
        f"block_forward_{each}",
        (images * down * right,),
        (
            *(c, bias, y, winner, height, width, channels, out_height, out_width, rows, columns, down, right),
            *(size, stride, *_normalisation(lrn), relu_last),
        ),
        dtype=c.dtype,
        block=block,
        shared=pixels * channels * 4,
    )
    return y, winner


def _finish_backward(
    dy: Array,
    winner: Array | None,
    c: Array,
    bias: Array | None,
    lrn: Lrn | None,
    pool: Pool | None,
    relu_last: bool,
) -> tuple[Array, Array]:
    """The gradient of the convolution's result, and db."""
    images, height, width, channels = c.shape
    dy = cast(dy, c.dtype)
    size, stride = pool or (1, 1)
    lanes, block, each = _threads(channels, lrn)
    pixels = images * height * width
    parts = max(1, min(BACKWARD_BLOCKS, -(-pixels // lanes)))
    dc = empty(c.shape, c.dtype)
    partial = empty((parts, channels), "float32")
    launch(
        f"block_backward_{each}",
        (parts,),
        (
            *(dy, winner, c, bias, dc, partial, pixels, height, width, channels, dy.shape[1], dy.shape[2]),
            *(size, stride, *_normalisation(lrn), relu_last),
        ),
        dtype=c.dtype,
        block=block,
        shared=2 * lanes * channels * 4,
    )
    return dc, sum_parts(partial)


def _normalisation(lrn: Lrn | None) -> tuple[int, int, float, float, float]:
    """The kernels' arguments: whether, half the window, k, alpha, beta."""
    if lrn is None:
        return 0, 0, 1.0, 0.0, 0.75
    size, k, alpha, beta = lrn
    return 1, size // 2, k, alpha, beta


def _threads(channels: int, lrn: Lrn | None) -> tuple[int, int, int]:
    """Pixels a block works on at once, its threads, and channels a thread.

    Four channels a thread, which LRN has been written out for where its window spans five channels; else one.
    """
    if channels % 4 == 0 and channels <= 4 * THREADS and (lrn is None or lrn[0] // 2 == 2):
        return THREADS // (channels // 4), THREADS, 4
    if channels > 512:
        raise ValueError(
            f"LRN and pooling on the GPU take up to 512 channels that are no multiple of 4, not {channels}"
        )
    block = max(THREADS, -(-channels // 32) * 32)
    return block // channels, block, 1


@cache
def tile(out_height: int, out_width: int, size: int, stride: int, channels: int) -> tuple[int, int]:
    """Rows and columns of outputs a block computes: those for which the fewest pixels are read twice."""
    best, least = (1, 1), float("inf")
    for rows in range(1, out_height + 1):
        for columns in range(1, out_width + 1):
            pixels = ((rows - 1) * stride + size) * ((columns - 1) * stride + size)
            if (rows, columns) != (1, 1) and pixels * channels * 4 > TILE_MEMORY:
                break
            cost = pixels * -(-out_height // rows) * -(-out_width // columns)
            if cost < least:
                best, least = (rows, columns), cost
    return best
