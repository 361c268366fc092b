"""Caffe's ``.caffemodel`` and ``.binaryproto`` files: protocol buffers, read with the few fields that matter here.

A protocol buffer is a sequence of fields, each a key (field number and wire type, a varint) and a value: a varint
(wire type 0), 8 bytes (1), a length and so many bytes (2: text, a packed array, or a message within), or 4 bytes (5).
Fields this reader does not know are passed over, as the format intends. From ``caffe.proto``::

    NetParameter       name = 1, layers = 2 (V1LayerParameter), layer = 100 (LayerParameter)
    LayerParameter     name = 1, type = 2 (text), blobs = 7
    V1LayerParameter   name = 4, type = 5 (number), blobs = 6
    BlobProto          num, channels, height, width = 1..4, data = 5, shape = 7, double_data = 8
    BlobShape          dim = 1

Blobs have PyTorch's layout (``layout.py``). conv1's input channels are blue, green, red, as Caffe feeds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from net.layers import Shape
from net.weights.errors import WeightsError
from net.weights.layout import check_shapes
from net.weights.tensors import check_finite

LARGEST: Final = 2**31 - 1  # bytes; protocol buffers allow no more
_V1_TYPES: Final = {4: "Convolution", 14: "InnerProduct", 15: "LRN", 17: "Pooling", 18: "ReLU"}
_MOST_LAYERS, _MOST_BLOBS, _MOST_AXES = 1000, 16, 8

Field = tuple[int, int, int | memoryview]  # number, wire type, value


@dataclass(frozen=True)
class Blob:
    """An array as it stands in the file: numbers of type ``dtype`` in ``parts``, one after the other."""

    shape: Shape
    dtype: str
    parts: list[memoryview]

    def array(self) -> np.ndarray:
        """The numbers, float32."""
        numbers = np.concatenate([np.frombuffer(part, dtype=self.dtype) for part in self.parts])
        return numbers.astype(np.float32, copy=False).reshape(self.shape)


@dataclass(frozen=True)
class CaffeLayer:
    """A layer as a caffemodel describes it: its name, its type such as ``Convolution``, its arrays (weights, bias)."""

    name: str
    type: str
    blobs: list[Blob]


def read_blobs(path: Path) -> dict[str, Blob]:
    """The arrays of a caffemodel by PyTorch's names (``conv1.weight``, ``conv1.bias``), none copied yet.

    Raises
    ------
    WeightsError
        The file is damaged, too large, or a network that pools before it normalises.
    """
    layers = _layers(_contents(path))
    _refuse_caffenet(layers)
    return {
        f"{layer.name}.{kind}": blob
        for layer in layers
        for kind, blob in zip(("weight", "bias"), layer.blobs, strict=False)
    }


def read_arrays(blobs: dict[str, Blob], expected: dict[str, Shape]) -> dict[str, np.ndarray]:
    """The arrays named in ``expected``, float32, after their shapes have been compared with it.

    Raises
    ------
    WeightsError
        Another name or shape than expected, before any number has been copied; a number that is not finite.
    """
    fitted = {
        name: replace(blob, shape=_without_leading_ones(blob.shape, expected.get(name))) for name, blob in blobs.items()
    }
    check_shapes({name: blob.shape for name, blob in fitted.items()}, expected)
    arrays = {name: blob.array() for name, blob in fitted.items()}
    check_finite(arrays)
    return arrays


def read_mean(path: Path) -> np.ndarray:
    """A mean image (``imagenet_mean.binaryproto``): float32 (height, width, 3), red, green, blue, 0..255."""
    blob = _blob(_contents(path))
    shape = blob.shape[1:] if len(blob.shape) == 4 and blob.shape[0] == 1 else blob.shape
    if len(shape) != 3 or shape[0] != 3:
        raise WeightsError(f"it holds an array of shape {blob.shape}, not a mean image of three channels")
    mean = np.ascontiguousarray(blob.array().reshape(shape)[::-1].transpose(1, 2, 0))
    check_finite({"mean": mean})
    return mean


def _layers(data: memoryview) -> list[CaffeLayer]:
    """All layers of a ``NetParameter``, in order; arrays are not copied."""
    layers = []
    for number, wire, value in _fields(data):
        if number in (2, 100) and wire == 2:
            assert isinstance(value, memoryview)
            layers.append(_layer(value, old=number == 2))
            if len(layers) > _MOST_LAYERS:
                raise WeightsError(f"it has more than {_MOST_LAYERS} layers")
    return layers


def _layer(data: memoryview, *, old: bool) -> CaffeLayer:
    name_field, type_field, blobs_field = (4, 5, 6) if old else (1, 2, 7)
    name, kind, blobs = "", "", []
    for number, _, value in _fields(data):
        if number == name_field and isinstance(value, memoryview):
            name = _text(value)
        elif number == type_field:
            kind = _text(value) if isinstance(value, memoryview) else _V1_TYPES.get(value, str(value))
        elif number == blobs_field and isinstance(value, memoryview):
            blobs.append(_blob(value))
            if len(blobs) > _MOST_BLOBS:
                raise WeightsError(f"its layer {name!r} has more than {_MOST_BLOBS} arrays")
    return CaffeLayer(name, kind, blobs)


def _blob(data: memoryview) -> Blob:
    legacy, dims, parts, dtype = {}, None, [], "<f4"
    for number, wire, value in _fields(data):
        if number in (1, 2, 3, 4) and isinstance(value, int):
            legacy[number] = value
        elif number == 7 and isinstance(value, memoryview):
            dims = _shape(value)
        elif number in (5, 8):
            if wire != 2:
                raise WeightsError("its arrays are not packed; save the model with a current Caffe")
            assert isinstance(value, memoryview)
            dtype = "<f4" if number == 5 else "<f8"
            parts.append(value)
    shape = tuple(dims) if dims is not None else tuple(legacy.get(axis, 0) for axis in (1, 2, 3, 4))
    size = sum(len(part) for part in parts)
    width = np.dtype(dtype).itemsize
    if not size:
        raise WeightsError(f"an array of shape {shape} comes with 0 bytes")
    if any(len(part) % width for part in parts) or math.prod(shape) * width != size:
        raise WeightsError(f"an array of shape {shape} comes with {size} bytes, not {math.prod(shape) * width}")
    return Blob(shape, dtype, parts)


def _shape(data: memoryview) -> list[int]:
    dims: list[int] = []
    for number, _, value in _fields(data):
        if number != 1:
            continue
        if isinstance(value, int):
            dims.append(value)
        else:
            place = 0
            while place < len(value) and len(dims) <= _MOST_AXES:
                dim, place = _varint(value, place)
                dims.append(dim)
        if len(dims) > _MOST_AXES:
            raise WeightsError(f"an array has more than {_MOST_AXES} axes")
    return dims


def _fields(data: memoryview) -> Iterator[Field]:
    """The fields of one message: (number, wire type, varint or bytes)."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, wire, value
            continue
        if wire == 2:
            length, place = _varint(data, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise WeightsError(f"it is damaged or no protocol buffer (wire type {wire})")
        if length > len(data) - place:
            raise WeightsError("it is cut short, or no protocol buffer")
        yield number, wire, data[place : place + length]
        place += length


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """A number in base 128, lowest digits first, and the place after it."""
    value = 0
    for digit in range(10):
        if place >= len(data):
            raise WeightsError("it is cut short, or no protocol buffer")
        byte = data[place]
        place += 1
        value |= (byte & 127) << 7 * digit
        if byte < 128:
            return value, place
    raise WeightsError("it is damaged or no protocol buffer (a number of more than ten bytes)")


def _contents(path: Path) -> memoryview:
    size = path.stat().st_size
    if size > LARGEST:
        raise WeightsError(f"it has {size} bytes, more than a protocol buffer can have")
    return memoryview(path.read_bytes())


def _text(data: memoryview) -> str:
    if len(data) > 1000:
        raise WeightsError("a name in it has more than 1000 bytes")
    return bytes(data).decode("utf-8", errors="replace")


def _without_leading_ones(shape: Shape, wanted: Shape | None) -> Shape:
    """Old files give every array four axes, fc6's bias (1, 1, 1, 4096); drop the leading 1s the network has not."""
    if wanted is None or len(wanted) >= len(shape) or any(size != 1 for size in shape[: len(shape) - len(wanted)]):
        return shape
    return shape[len(shape) - len(wanted) :]


def _refuse_caffenet(layers: list[CaffeLayer]) -> None:
    """Caffe's other AlexNet, CaffeNet, has the same arrays but pools before it normalises."""
    places = {layer.name: place for place, layer in enumerate(layers)}
    if "norm1" in places and "pool1" in places and places["pool1"] < places["norm1"]:
        raise WeightsError(
            "it pools before it normalises, like bvlc_reference_caffenet; this network does it the other way round, "
            "like bvlc_alexnet"
        )
