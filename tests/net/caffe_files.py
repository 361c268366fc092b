"""Caffe's files as tests write them: protocol buffers with the field numbers of caffe.proto, by hand."""

from __future__ import annotations

import struct

import numpy as np


def varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def blob(array: np.ndarray, *, old: bool = False, double: bool = False) -> bytes:
    """A BlobProto; ``old`` ones give num, channels, height, width instead of a shape."""
    if old:
        four = (1,) * (4 - array.ndim) + array.shape
        shape = b"".join(field(axis, size) for axis, size in zip((1, 2, 3, 4), four, strict=True))
    else:
        shape = field(7, field(1, b"".join(varint(size) for size in array.shape)))
    numbers = field(8, array.astype("<f8").tobytes()) if double else field(5, array.astype("<f4").tobytes())
    return shape + numbers if not old else numbers + shape


def caffemodel(tensors: dict[str, np.ndarray], *, old: bool, order: tuple[str, ...] = ("norm1", "pool1")) -> bytes:
    """A NetParameter with the layers of bvlc_alexnet."""
    message = [field(1, "AlexNet")]
    names = [
        "data",
        "conv1",
        "relu1",
        *order,
        "conv2",
        "norm2",
        "pool2",
        "conv3",
        "conv4",
        "conv5",
        "fc6",
        "fc7",
        "fc8",
    ]
    kinds = {"conv": ("Convolution", 4), "fc": ("InnerProduct", 14), "norm": ("LRN", 15), "pool": ("Pooling", 17)}
    for name in names:
        text, number = kinds.get(name.rstrip("0123456789"), ("ReLU", 18))
        blobs = [blob(tensors[f"{name}.{k}"], old=old) for k in ("weight", "bias") if f"{name}.{k}" in tensors]
        if old:
            layer = field(4, name) + field(5, number) + field(2, "below") + b"".join(field(6, b) for b in blobs)
            message.append(field(2, layer))
        else:
            ratio = varint(5 << 3 | 5) + struct.pack("<f", 1.0)  # loss_weight, unpacked: passed over
            layer = field(1, name) + field(2, text) + ratio + b"".join(field(7, b) for b in blobs)
            message.append(field(100, layer))
    return b"".join(message)
