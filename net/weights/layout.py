"""Between this project's arrays and the layout that PyTorch and Caffe share.

============  =================================  ==================================
layer         here (NHWC)                        PyTorch, Caffe (NCHW)
============  =================================  ==================================
conv1..conv5  ``conv1.w`` (KH, KW, Cin/g, Cout)  ``conv1.weight`` (Cout, Cin/g, KH, KW)
fc6           ``fc6.w`` (H W C, 4096)            ``fc6.weight`` (4096, C H W)
fc7, fc8      ``fc7.w`` (Cin, Cout)              ``fc7.weight`` (Cout, Cin)
biases        ``conv1.b`` (Cout,)                ``conv1.bias`` (Cout,)
============  =================================  ==================================

fc6 sees the last pooled maps flattened: row, column, channel here, channel, row, column there. g is the number of
groups; the first Cout/g maps see the first Cin/g channels in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from net.layers import Conv, Flatten, Layer, Linear, Shape
from net.weights.errors import WeightsError

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Place:
    """Where one parameter goes: reshape to ``split``, transpose by ``axes``, reshape to ``torch``; and back."""

    name: str  # in PyTorch's layout
    here: Shape
    split: Shape
    axes: tuple[int, ...]
    torch: Shape


def torch_shapes(layers: Sequence[Layer], shape: Shape) -> dict[str, Shape]:
    """Names and shapes of all parameters in PyTorch's layout, for an input of (height, width, channels)."""
    return {place.name: place.torch for place in _places(layers, shape).values()}


def to_torch(layers: Sequence[Layer], shape: Shape, parameters: Arrays) -> Arrays:
    """This project's parameters in PyTorch's names and layout, as contiguous arrays."""
    return {
        place.name: np.ascontiguousarray(
            parameters[name].reshape(place.split).transpose(place.axes).reshape(place.torch)
        )
        for name, place in _places(layers, shape).items()
    }


def from_torch(layers: Sequence[Layer], shape: Shape, tensors: Arrays) -> Arrays:
    """The inverse of :func:`to_torch`; ``tensors`` must have exactly the shapes of :func:`torch_shapes`."""
    parameters = {}
    for name, place in _places(layers, shape).items():
        moved = tensors[place.name].reshape([place.split[axis] for axis in place.axes])
        back = np.argsort(place.axes)
        parameters[name] = np.ascontiguousarray(moved.transpose(back).reshape(place.here), dtype=np.float32)
    return parameters


def check_shapes(found: dict[str, Shape], expected: dict[str, Shape]) -> None:
    """Refuse names or shapes other than the network's.

    Raises
    ------
    WeightsError
        Naming the first array that is missing, not known, or of another shape.
    """
    for name, shape in expected.items():
        if name not in found:
            raise WeightsError(f"it has no array {name}, which this network needs")
        if found[name] != shape:
            raise WeightsError(f"its {name} has shape {_text(found[name])}, this network's is {_text(shape)}")
    unknown = sorted(found.keys() - expected.keys())
    if unknown:
        raise WeightsError(f"it has an array {unknown[0]!r}, which this network has not")


def _places(layers: Sequence[Layer], shape: Shape) -> dict[str, _Place]:
    places = {}
    maps: Shape | None = None  # shape before Flatten, while its features are not mixed yet
    for layer in layers:
        if isinstance(layer, Flatten):
            maps = shape
        for name, here in layer.parameter_shapes(shape).items():
            if not isinstance(layer, Conv | Linear):
                raise WeightsError(f"{name} has no place in PyTorch's layout yet; give it one in net/weights/layout.py")
            if name.endswith(".b"):
                places[name] = _Place(f"{name[:-2]}.bias", here, here, (0,), here)
                continue
            split = here
            if isinstance(layer, Linear) and maps is not None:
                split, maps = (*maps, here[1]), None
            axes = (3, 2, 0, 1) if len(split) == 4 else (1, 0)
            moved = tuple(split[axis] for axis in axes)
            torch = moved if isinstance(layer, Conv) else (here[1], here[0])
            places[name] = _Place(f"{name[:-2]}.weight", here, split, axes, torch)
        shape = layer.output_shape(shape)
    return places


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "()"
