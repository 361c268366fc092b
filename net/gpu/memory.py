"""How much of the device's memory a batch needs, and what there is."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

from net.gpu import blocks, graph, implicit
from net.gpu.cublas import WORKSPACE
from net.gpu.device import current
from net.gpu.shape import layer_shape
from net.layers import Conv, ConvBlock, Dropout, Flatten, Layer, Linear, LinearBlock, fuse

CONTEXT: Final = 600 * 2**20  # bytes: CUDA context, libraries and kernels
SLACK: Final = 1.1  # a pool of blocks of many sizes leaves gaps


def bytes_needed(layers: Sequence[Layer], shape: tuple[int, int, int], batch: int, *, training: bool) -> int:
    """Estimated device memory, in bytes, of a training step or a forward pass on pictures of ``shape``."""
    device = current()
    picture = 2 if device.precision == "bf16" else 4
    parameters = largest = 0
    current_shape: tuple[int, ...] = shape
    total = batch * prod(shape) * picture
    for layer in fuse(layers, blocks):
        output = layer.output_shape(current_shape)
        values = sum(prod(s) for s in layer.parameter_shapes(current_shape).values())
        parameters += values
        item = picture if len(output) == 3 else 4
        own, passing = batch * prod(output) * item, batch * prod(current_shape) * item
        if isinstance(layer, Conv | ConvBlock):
            conv = layer.conv if isinstance(layer, ConvBlock) else layer
            sizes = layer_shape(conv, current_shape, batch)
            result = batch * sizes.pixels * sizes.maps * picture
            if picture == 2 and implicit.takes(sizes):
                folded = implicit.fold_shape(sizes)
                room = batch * folded.height * folded.width * folded.channels * picture if sizes.stride > 1 else 0
                kept = True
            else:
                piece = sizes.images_at_once(device.memory, picture)
                room, kept = piece * sizes.pixels * sizes.row * picture, piece == batch
            if training and kept and isinstance(layer, ConvBlock):
                own += room
            passing += room + result
            if isinstance(layer, ConvBlock) and layer.pool:
                own += result + batch * prod(output)
        if isinstance(layer, Linear | LinearBlock) and picture == 2:
            own += values * picture
        if isinstance(layer, Flatten) or (isinstance(layer, Dropout) and not training):
            own = 0
        total += own if training else 0
        largest = max(largest, own + passing + values * 4)
        current_shape = output
    states = parameters * 4 * (3 if training else 1)  # gradients wait for their updates beside the backward pass
    inputs = 4 * batch * prod(shape)  # three slots of uint8 pictures, and the recording's own
    return int(SLACK * (total + largest + states + inputs)) + WORKSPACE + CONTEXT


def largest_batch(layers: Sequence[Layer], shape: tuple[int, int, int], *, training: bool) -> int:
    """The largest batch whose estimate fits into the memory this program can have; 0 if none does."""
    room = available()
    low, high = 0, 65536
    while low < high:
        middle = (low + high + 1) // 2
        fits = bytes_needed(layers, shape, middle, training=training) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def available() -> int:
    """Bytes of the device's memory that this program has or can have, its context included."""
    device = current()
    free, _ = device.cupy.cuda.runtime.memGetInfo()
    return min(device.memory, free + device.cupy.get_default_memory_pool().total_bytes() + graph.held() + CONTEXT)


def check_memory(
    layers: Sequence[Layer], shape: tuple[int, int, int], batch: int, *, training: bool, views: int = 1
) -> None:
    """Refuse a batch that cannot fit, before anything is allocated; ``views`` crops a picture go through at once.

    Raises
    ------
    MemoryError
        One plain sentence: what is needed, what there is, the largest batch that fits.
    """
    device, room = current(), available()
    needed = bytes_needed(layers, shape, batch * views, training=training)
    if needed <= room:
        return
    largest = largest_batch(layers, shape, training=training) // views
    key = "train.batch_size" if training else "eval.batch_size"
    others = "" if device.memory - room < CONTEXT else f", {_gib(room)} of it not taken by other programs"
    raise MemoryError(
        f"a batch of {batch} needs about {_gib(needed)} and {device.name} has {_gib(device.memory)}{others}; "
        + (f"the largest batch that fits is {largest}: --set {key}={largest}" if largest else "not even one fits")
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
