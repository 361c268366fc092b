"""The sizes of a convolution, and how many images' columns are made at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from net.layers import Array, Conv, Shape
from net.shapes import windows

LARGEST_COLUMNS: Final = 2**31 - 1  # elements; the kernels count those of a piece in 32 bits
COLUMNS_SHARE: Final = 1 / 16  # of the device's memory, for the columns of one layer


@dataclass(frozen=True)
class ConvShape:
    """Sizes of one convolution."""

    images: int
    height: int
    width: int
    channels: int
    kernel_h: int
    kernel_w: int
    maps: int
    stride: int
    pad: int
    groups: int

    @property
    def out_height(self) -> int:
        return windows(self.height, self.kernel_h, self.stride, self.pad)

    @property
    def out_width(self) -> int:
        return windows(self.width, self.kernel_w, self.stride, self.pad)

    @property
    def pixels(self) -> int:
        """Output pixels of one image."""
        return self.out_height * self.out_width

    @property
    def depth(self) -> int:
        """Values one group's window covers."""
        return self.kernel_h * self.kernel_w * (self.channels // self.groups)

    @property
    def padded(self) -> int:
        """``depth`` filled up to a multiple of 8, for 16-byte boundaries in either type."""
        return -(-self.depth // 8) * 8

    @property
    def row(self) -> int:
        """Elements of one output pixel's columns, all groups."""
        return self.groups * self.padded

    def images_at_once(self, memory: int, itemsize: int) -> int:
        """How many images' columns are made at a time on a device with so much memory."""
        each = self.pixels * self.row
        return max(1, min(self.images, LARGEST_COLUMNS // each, int(memory * COLUMNS_SHARE) // (each * itemsize)))


def layer_shape(conv: Conv, shape: Shape, images: int) -> ConvShape:
    """Sizes of a layer's convolution of so many pictures of (height, width, channels)."""
    height, width, channels = shape
    return ConvShape(
        images, height, width, channels, conv.size, conv.size, conv.maps, conv.stride, conv.pad, conv.groups
    )


def shape_of(x: Array, w: Array, stride: int, pad: int, groups: int) -> ConvShape:
    """Sizes of the convolution of x (N, H, W, Cin) with w (KH, KW, Cin/groups, Cout)."""
    (images, height, width, channels), (kernel_h, kernel_w, depth, maps) = x.shape, w.shape
    shape = ConvShape(images, height, width, channels, kernel_h, kernel_w, maps, stride, pad, groups)
    if depth * groups != shape.channels or shape.maps % groups:
        raise ValueError(f"weights {w.shape} in {groups} groups do not fit a picture of {shape.channels} channels")
    if shape.images == 0:
        raise ValueError("the batch is empty")
    return shape
