"""The network as an ONNX model: uint8 crops in, scores and probabilities out.

Input ``crops`` uint8 (N, crop, crop, 3): red, green, blue, 0..255. Subtracting the mean, scaling, the channel order
and the zero border are part of the graph, and so is the softmax. Outputs ``scores`` (before the softmax) and
``probabilities``, both float32 (N, classes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from net.layers import Conv, Dropout, Flatten, Layer, Linear, Lrn, MapNorm, MaxPool, Relu, Shape
from net.network import Preparation
from net.weights.errors import WeightsError
from net.weights.layout import to_torch

OPSET: Final = 17  # of the default domain; known to whatever has been released since 2022
IR_VERSION: Final = 8  # the oldest with this opset


class _Graph:
    """Nodes and constants in order; each method adds one step to the end of the chain."""

    def __init__(self, name: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.last = name

    def add(
        self, operator: str, *others: str, name: str | None = None, first: str | None = None, **attributes: Any
    ) -> str:
        """Apply ``operator`` to the last result (or ``first``) and the ``others``; its result becomes the last."""
        name = name or f"{operator.lower()}_{len(self.nodes)}"
        inputs = [first or self.last, *others]
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        self.last = name
        return name

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name


def onnx_model(
    layers: Sequence[Layer],
    parameters: dict[str, np.ndarray],
    preparation: Preparation,
    crop: int,
    metadata: dict[str, str],
) -> onnx.ModelProto:
    """Build and check the model of a plain list of layers (``net.alexnet``, not fused).

    Parameters
    ----------
    parameters : float32 NumPy arrays, this project's names and layout
    preparation : its mean is None or a NumPy array (M, M, 3); of a mean larger than the crop the centre is used
    crop : side of the crops in pixels
    metadata : text to store in the model

    Raises
    ------
    WeightsError
        A layer or a parameter is of a kind that is not known here.
    """
    graph = _Graph("crops")
    _prepare(graph, preparation, crop)
    side = crop + sum(preparation.border)
    shape: Shape = (side, side, 3)
    for name, array in to_torch(layers, shape, parameters).items():
        graph.constant(name, array)
    for layer in layers:
        _layer(graph, layer)
        shape = layer.output_shape(shape)
    graph.add("Identity", name="scores")
    graph.add("Softmax", name="probabilities", axis=1)
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", shape[0]])
        for name in ("scores", "probabilities")
    ]
    inputs = [helper.make_tensor_value_info("crops", TensorProto.UINT8, ["batch", crop, crop, 3])]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "alexnet", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="alexnet-by-hand",
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model


def _prepare(graph: _Graph, preparation: Preparation, crop: int) -> None:
    """What ``augment`` does to a crop that is neither mirrored nor shifted, then NHWC -> NCHW."""
    graph.add("Cast", to=TensorProto.FLOAT)
    if preparation.mean is not None:
        first = (preparation.mean.shape[0] - crop) // 2
        graph.add("Sub", graph.constant("mean", preparation.mean[first : first + crop, first : first + crop]))
    graph.add("Mul", graph.constant("scale", preparation.scale))
    if preparation.bgr:
        graph.add("Gather", graph.constant("bgr", [2, 1, 0], np.int64), axis=3)
    before, after = preparation.border
    if before or after:
        graph.add("Pad", graph.constant("border", [0, before, before, 0, 0, after, after, 0], np.int64))
    graph.add("Transpose", perm=[0, 3, 1, 2])


def _layer(graph: _Graph, layer: Layer) -> None:
    match layer:
        case Conv():
            names = [f"{layer.name}.weight", f"{layer.name}.bias"]
            strides, pads = [layer.stride] * 2, [layer.pad] * 4
            graph.add("Conv", *names, name=layer.name, strides=strides, pads=pads, group=layer.groups)
        case Linear():
            graph.add("Gemm", f"{layer.name}.weight", f"{layer.name}.bias", name=layer.name, transB=1)
        case Relu():
            graph.add("Relu")
        case MaxPool():
            graph.add("MaxPool", kernel_shape=[layer.size] * 2, strides=[layer.stride] * 2)
        case Lrn():
            # ONNX divides alpha by its size, and spans `size` channels; ours spans 2 (size // 2) + 1.
            span = 2 * (layer.size // 2) + 1
            graph.add("LRN", size=span, alpha=layer.alpha * span, beta=layer.beta, bias=layer.k)
        case MapNorm():
            _map_norm(graph, layer)
        case Flatten():
            graph.add("Flatten")
        case Dropout():
            if not layer.scale_in_training:
                graph.add("Mul", graph.constant(f"keep{layer.number}", layer.keep))
        case _:
            kind = type(layer).__name__
            raise WeightsError(f"the layer {kind} has no form in net/weights/onnx_graph.py yet; give it one there")


def _map_norm(graph: _Graph, layer: MapNorm) -> None:
    x, reach = graph.last, layer.size // 2
    span = 2 * reach + 1
    graph.add("Mul", x)
    # The average over a window that counts the zeros beyond the border, times its pixels, is the sum.
    graph.add("AveragePool", kernel_shape=[span] * 2, pads=[reach] * 4, count_include_pad=1)
    graph.add("Mul", graph.constant("map_norm.alpha", layer.alpha * span**2))
    graph.add("Add", graph.constant("map_norm.k", layer.k))
    graph.add("Pow", graph.constant("map_norm.minus_beta", -layer.beta))
    graph.add("Mul", x)
