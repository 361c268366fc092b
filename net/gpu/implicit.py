"""Convolutions in bfloat16 whose columns are never stored: kernels of our own on the tensor cores (``implicit.cu``).

One kernel computes y, one dw. The gradient of the input is the first kernel again, over dy, with the weights turned
round. A stride is folded away first: pictures of (H, W, C) become (H/s, W/s, s*s*C) and the window shrinks with them,
which also gives conv1, with its three channels, rows of 48 values to copy at a time.

Which layers come here is decided by their sizes alone (:func:`suits`); the others, and the other precisions, go through
``columns.cu`` and cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Final, Protocol

from net.gpu.arrays import BFLOAT16, blocks, empty
from net.gpu.device import current
from net.gpu.kernels import launch
from net.gpu.shape import ConvShape
from net.layers import Array

BLOCK: Final = 128  # threads, as in implicit.cu
ROWS: Final = 128  # of the product, a block
DEPTH: Final = 64  # terms of the sum, a slice
PANEL: Final = 64  # columns of the product that lie side by side in shared memory
TILES: Final = (128, 96, 48)  # columns of the product a block computes, for which there are kernels
LARGEST: Final = 2**31 - 1  # elements of a picture array


class Room(Protocol):
    """What a plan must know of a card; :class:`net.gpu.device.Device` does."""

    @property
    def processors(self) -> int: ...

    @property
    def shared_processor(self) -> int: ...


def suits(shape: ConvShape) -> bool:
    """Whether a convolution of this shape goes through these kernels now."""
    return current().storage == BFLOAT16 and takes(shape)


def takes(shape: ConvShape) -> bool:
    """Whether a convolution of this shape is better off with these kernels, and possible.

    Of one group and stride 1 (conv3) cuBLAS's product is faster by more than writing the columns costs: 302 us beside
    350 in all (docs/gpu.md).
    """
    return possible(shape) and (shape.stride > 1 or shape.groups > 1)


def possible(shape: ConvShape) -> bool:
    """Whether these kernels can compute a convolution of this shape.

    They are made for 16-byte pieces of each group's channels and maps, and hold rows and columns in 16 bits, places in
    memory in 32.
    """
    if shape.stride > 1 and (shape.groups > 1 or shape.pad > 0):
        return False
    folded = fold_shape(shape)
    small = max(folded.height, folded.width) < 2**14
    elements = max(folded.height * folded.width * folded.channels, shape.pixels * shape.maps) * shape.images
    pieces = folded.channels // folded.groups % 8 == 0 and shape.maps // shape.groups % 8 == 0
    return pieces and small and elements <= LARGEST and shape.kernel_h == shape.kernel_w and shape.pad < shape.kernel_h


def fold_shape(shape: ConvShape) -> ConvShape:
    """The convolution of stride 1 that computes the same: of each s x s pixels the channels of one."""
    s = shape.stride
    return replace(
        shape,
        height=ceil(shape.height / s),
        width=ceil(shape.width / s),
        channels=shape.channels * s * s,
        kernel_h=ceil(shape.kernel_h / s),
        kernel_w=ceil(shape.kernel_w / s),
        stride=1,
    )


def fold(x: Array, shape: ConvShape) -> Array:
    """x (N, H, W, C) as the kernels take it: itself, or for a stride of more than 1 folded."""
    s = shape.stride
    if s == 1:
        return x
    folded = fold_shape(shape)
    y = empty((shape.images, folded.height, folded.width, folded.channels), x.dtype)
    launch(
        "fold_picture",
        (shape.images * folded.height,),
        (x, y, shape.height, shape.width, shape.channels, s, folded.height, folded.width),
        dtype=x.dtype,
        shared=s * shape.width * shape.channels * 2,
    )
    return y


def fold_weights(w: Array, shape: ConvShape) -> Array:
    """w float32 (KH, KW, C, M) as the matrix (depth, M) that goes with a folded picture."""
    folded = fold_shape(shape)
    matrix = empty((folded.depth, shape.maps), BFLOAT16)
    arguments = (w, matrix, matrix.size, shape.kernel_h, shape.kernel_w, shape.channels, shape.maps, shape.stride)
    launch("fold_weights", blocks(matrix.size), arguments, dtype=BFLOAT16)
    return matrix


def forward(x: Array, w: Array, shape: ConvShape, bias: Array | None = None, *, rectify: bool = False) -> Array:
    """y (N, OH, OW, M) from ``x`` and ``w`` as :func:`fold` and :func:`fold_weights` give them."""
    y = empty((shape.images, shape.out_height, shape.out_width, shape.maps), x.dtype)
    _convolve(x, w, y, fold_shape(shape), bias, rectify)
    return y


def input_gradient(dy: Array, w: Array, shape: ConvShape) -> Array:
    """dx (N, H, W, C) of a convolution of stride 1; ``w`` is the matrix (depth, M) of the forward pass."""
    taps, each, maps_each = (
        shape.kernel_h * shape.kernel_w,
        shape.channels // shape.groups,
        shape.maps // shape.groups,
    )
    turned = empty((taps * maps_each, shape.channels), w.dtype)
    arguments = (w, turned, taps, each, shape.groups, maps_each)
    launch("turn_weights", blocks(turned.size, 8), arguments, dtype=w.dtype)
    dx = empty((shape.images, shape.height, shape.width, shape.channels), dy.dtype)
    _convolve(dy, turned, dx, backwards(shape), None, False)
    return dx


def backwards(shape: ConvShape) -> ConvShape:
    """The convolution that leads from dy back to dx."""
    return replace(
        shape,
        height=shape.out_height,
        width=shape.out_width,
        channels=shape.maps,
        maps=shape.channels,
        pad=shape.kernel_h - 1 - shape.pad,
    )


def weight_gradient(dy: Array, x: Array, shape: ConvShape) -> Array:
    """dw (KH, KW, C/groups, M) float32; ``x`` as :func:`fold` gives it."""
    folded, parts = fold_shape(shape), gradient_plan(shape, current())
    partial = empty((parts.count, folded.depth, shape.maps), "float32")
    launch(
        f"weight_gradient_{parts.tile}",
        (parts.blocks, parts.count),
        (
            *(x, dy, partial, shape.images * shape.pixels, folded.height, folded.width, folded.channels, folded.depth),
            *(folded.kernel_w, shape.pad, shape.out_height, shape.out_width, shape.groups, shape.maps),
            *(parts.stretch, parts.stages),
        ),
        dtype=dy.dtype,
        block=BLOCK,
        shared=parts.shared,
    )
    each = shape.channels // shape.groups
    dw = empty((shape.kernel_h, shape.kernel_w, each, shape.maps), "float32")
    arguments = (partial, dw, parts.count, folded.depth, dw.size, shape.kernel_w, each, shape.maps, shape.stride)
    launch("add_parts", blocks(dw.size, 4), arguments, dtype=dy.dtype)
    return dw


def _convolve(x: Array, w: Array, y: Array, shape: ConvShape, bias: Array | None, rectify: bool) -> None:
    plan = product_plan(shape, y.shape[1] * y.shape[2], current())
    launch(
        f"convolve_{plan.tile}",
        (plan.blocks,),
        (
            *(x, w, bias, y, shape.images * y.shape[1] * y.shape[2], shape.height, shape.width, shape.channels),
            *(shape.depth, shape.kernel_w, shape.pad, y.shape[1], y.shape[2], shape.groups, shape.maps),
            *(rectify, plan.stages),
        ),
        dtype=x.dtype,
        block=BLOCK,
        shared=plan.shared,
    )


# --- plans ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a product is cut up."""

    tile: int  # maps a block computes
    blocks: int  # of the product; of each part, where the sum is split
    stages: int
    shared: int  # bytes
    count: int = 1  # parts of the sum
    stretch: int = 0  # pixels a part


def product_plan(shape: ConvShape, pixels: int, room: Room) -> Plan:
    """Of y (or dx), ``pixels`` of an image."""
    rows = ceil(shape.images * pixels / ROWS)
    places = ceil(shape.depth / DEPTH) * (DEPTH // 8) * 8

    def plan(tile: int) -> Plan:
        stages = slices(tile, places, room)
        count = rows * shape.groups * ceil(shape.maps // shape.groups / tile)
        return Plan(tile, count, stages, stages * _stage(tile) + places)

    return min((plan(tile) for tile in TILES), key=lambda p: _cost(p, room))


def gradient_plan(shape: ConvShape, room: Room) -> Plan:
    """Of dw: its blocks alone would leave most of the device idle, so that the sum over the pixels is split."""
    folded, pixels = fold_shape(shape), shape.images * shape.pixels
    corners = 2 * DEPTH * 8

    def plan(tile: int) -> Plan:
        stages = slices(tile, corners, room)
        shared = stages * _stage(tile) + corners
        blocks = ceil(folded.depth / ROWS) * shape.groups * ceil(shape.maps // shape.groups / tile)
        whole = Plan(tile, blocks, stages, shared)
        parts = max(1, min(room.processors * together(whole, room) // blocks, pixels // (4 * DEPTH)))
        stretch = ceil(ceil(pixels / parts) / DEPTH) * DEPTH
        return replace(whole, count=ceil(pixels / stretch), stretch=stretch)

    return min((plan(tile) for tile in TILES if tile != 48), key=lambda p: _cost(p, room))


def _stage(tile: int) -> int:
    """Bytes of one slice of both operands."""
    return 2 * DEPTH * (ROWS + ceil(tile / PANEL) * PANEL)


def slices(tile: int, beside: int, room: Room) -> int:
    """How many slices are in shared memory (a plan's stages): three where two blocks then share a multiprocessor."""
    return 3 if 2 * (3 * _stage(tile) + beside + 1024) <= room.shared_processor else 2


def fits(stages: int, tile: int, beside: int, room: Room) -> bool:
    """Whether a block can have so many slices: a multiprocessor's shared memory less a kilobyte, which CUDA takes."""
    return stages * _stage(tile) + beside + 1024 <= room.shared_processor


def together(plan: Plan, room: Room) -> int:
    """Blocks a multiprocessor holds at once, by their shared memory and by the registers they have been given."""
    return max(1, min(3 if plan.tile == 48 else 2, room.shared_processor // (plan.shared + 1024)))


def _cost(plan: Plan, room: Room) -> float:
    """What a multiprocessor copies to its shared memory, which is what the kernels are bound by (docs/gpu.md)."""
    each = together(plan, room)
    rounds = ceil(plan.blocks * plan.count / (room.processors * each))
    return rounds * each * (ROWS + plan.tile) * (plan.stretch or 1)
