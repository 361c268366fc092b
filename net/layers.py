"""The layers AlexNet is made of: frozen values that know their shapes and which operations compute them.

A layer holds no weights. Parameters live in one dictionary, ``{"conv1.w": ..., "conv1.b": ...}``; what ``forward``
keeps for ``backward`` is returned beside its result. ``dy`` is the gradient of the loss with respect to y, ``dx`` that
with respect to x. Every layer has

``output_shape(shape)``
    shape of one image's output, (height, width, channels) or (features,)
``parameter_shapes(shape)``
    shapes of its parameters given its input's shape, empty for a layer without
``names``
    names of its parameters
``forward(ops, parameters, x, run) -> y, kept``
``backward(ops, parameters, dy, kept, need_dx) -> dx, gradients``
    ``gradients`` is a dictionary like ``parameters``, with this layer's names only; ``dx`` may be None where
    ``need_dx`` is False

``ops`` is a backend (``net.backend``). :func:`fuse` replaces runs of layers by :class:`ConvBlock` and
:class:`LinearBlock` where the backend computes them in one operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from types import ModuleType
from typing import Any, Protocol, TypeVar, cast

Array = Any  # the backend's array type
Shape = tuple[int, ...]
Parameters = dict[str, Array]


@dataclass(frozen=True)
class Run:
    """What a forward pass must know beside its input: whether it trains, and the key of its dropout masks.

    Where several processes share a batch, ``first`` is the place of the input's first picture in the whole batch.
    """

    training: bool
    seed: int = 0
    step: int | Array = 0  # a number, or an array of one element on the backend's device
    first: int | Array = 0  # likewise


class Layer(Protocol):
    """What every layer can do; see the head of this file."""

    def output_shape(self, shape: Shape) -> Shape: ...

    def parameter_shapes(self, shape: Shape) -> dict[str, Shape]: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def forward(self, ops: ModuleType, parameters: Parameters, x: Array, run: Run) -> tuple[Array, Any]: ...

    def backward(
        self, ops: ModuleType, parameters: Parameters, dy: Array, kept: Any, need_dx: bool
    ) -> tuple[Array | None, Parameters]: ...


class _WithoutParameters:
    """Shared by the layers without parameters; the output has the input's shape unless a layer says otherwise."""

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def parameter_shapes(self, shape: Shape) -> dict[str, Shape]:
        return {}

    @property
    def names(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Conv:
    """Convolution (paper, sections 3.2 and 3.5): ``maps`` kernels of ``size`` x ``size`` pixels.

    ``groups`` splits the channels as the paper's two GPUs did.

    >>> conv1 = Conv("conv1", 96, 11, stride=4)
    >>> conv1.output_shape((227, 227, 3))  # (227 - 11) // 4 + 1 = 55
    (55, 55, 96)
    >>> conv1.output_shape((224, 224, 3))
    (54, 54, 96)
    >>> Conv("conv2", 256, 5, pad=2, groups=2).parameter_shapes((27, 27, 96))
    {'conv2.w': (5, 5, 48, 256), 'conv2.b': (256,)}
    """

    name: str
    maps: int
    size: int
    stride: int = 1
    pad: int = 0
    groups: int = 1

    def output_shape(self, shape: Shape) -> Shape:
        height, width, _ = shape
        reach = 2 * self.pad - self.size
        return (height + reach) // self.stride + 1, (width + reach) // self.stride + 1, self.maps

    def parameter_shapes(self, shape: Shape) -> dict[str, Shape]:
        if shape[2] % self.groups or self.maps % self.groups:
            raise ValueError(f"{self.name}: {self.groups} groups cannot share {shape[2]} channels and {self.maps} maps")
        weights = (self.size, self.size, shape[2] // self.groups, self.maps)
        return {f"{self.name}.w": weights, f"{self.name}.b": (self.maps,)}

    @property
    def names(self) -> tuple[str, ...]:
        return f"{self.name}.w", f"{self.name}.b"

    @property
    def geometry(self) -> dict[str, int]:
        return {"stride": self.stride, "pad": self.pad, "groups": self.groups}

    def forward(self, ops: ModuleType, parameters: Parameters, x: Array, run: Run) -> tuple[Array, Any]:
        w, b = parameters[f"{self.name}.w"], parameters[f"{self.name}.b"]
        return ops.conv2d_forward(x, w, b, **self.geometry), x

    def backward(
        self, ops: ModuleType, parameters: Parameters, dy: Array, kept: Any, need_dx: bool
    ) -> tuple[Array | None, Parameters]:
        w = parameters[f"{self.name}.w"]
        dx, dw, db = ops.conv2d_backward(dy, kept, w, **self.geometry, need_dx=need_dx)
        return dx, {f"{self.name}.w": dw, f"{self.name}.b": db}


@dataclass(frozen=True)
class Linear:
    """Fully connected layer (paper, section 3.5): y = x w + b."""

    name: str
    units: int

    def output_shape(self, shape: Shape) -> Shape:
        return (self.units,)

    def parameter_shapes(self, shape: Shape) -> dict[str, Shape]:
        if len(shape) != 1:
            raise ValueError(f"{self.name} takes features, not maps of {shape}; put Flatten() before it")
        return {f"{self.name}.w": (shape[0], self.units), f"{self.name}.b": (self.units,)}

    @property
    def names(self) -> tuple[str, ...]:
        return f"{self.name}.w", f"{self.name}.b"

    def forward(self, ops: ModuleType, parameters: Parameters, x: Array, run: Run) -> tuple[Array, Any]:
        return ops.linear_forward(x, parameters[f"{self.name}.w"], parameters[f"{self.name}.b"]), x

    def backward(
        self, ops: ModuleType, parameters: Parameters, dy: Array, kept: Any, need_dx: bool
    ) -> tuple[Array | None, Parameters]:
        dx, dw, db = ops.linear_backward(dy, kept, parameters[f"{self.name}.w"], need_dx=need_dx)
        return dx, {f"{self.name}.w": dw, f"{self.name}.b": db}


@dataclass(frozen=True)
class Relu(_WithoutParameters):
    """y = max(x, 0) (paper, section 3.1)."""

    def forward(self, ops: ModuleType, parameters: Parameters, x: Array, run: Run) -> tuple[Array, Any]:
        y = ops.relu_forward(x)
        return y, y

    def backward(
        self, ops: ModuleType, parameters: Parameters, dy: Array, kept: Any, need_dx: bool
    ) -> tuple[Array | None, Parameters]:
        return ops.relu_backward(dy, kept), {}


@dataclass(frozen=True)
class Lrn(_WithoutParameters):
    """Local response normalisation over neighbouring channels (paper, section 3.3).

    ``alpha`` is the factor in front of the sum of squares, already divided by ``size`` where a recipe asks for it.
    """

    size: int
    k: float
    alpha: float
    beta: float

    def forward(self, ops: ModuleType, parameters: Parameters, x: Array, run: Run) -> tuple[Array, Any]:
        y, s = ops.lrn_forward(x, size=self.size, k=self.k, alpha=self.alpha, beta=self.beta)
        return y, (x, s)

    def backward(
        self, ops: ModuleType, parameters: Parameters, dy: Array, kept: Any, need_dx: bool
    ) -> tuple[Array | None, Parameters]:
        x, s = kept
        return ops.lrn_backward(dy, x, s, size=self.size, alpha=self.alpha, beta=self.beta), {}


@dataclass(frozen=True)
class MapNorm(_WithoutParameters):
    """The same normalisation over size x size pixels of one map; the authors' code has it after conv2's LRN."""

    size: int
    k: float
    alpha: float
    beta: float

    def forward(self, ops: ModuleType, parameters: Parameters, x: Array, run: Run) -> tuple[Array, Any]:
        y, s = ops.map_norm_forward(x, size=self.size, k=self.k, alpha=self.alpha, beta=self.beta)
        return y, (x, s)

    def backward(
        self, ops: ModuleType, parameters: Parameters, dy: Array, kept: Any, need_dx: bool
    ) -> tuple[Array | None, Parameters]:
        x, s = kept
        return ops.map_norm_backward(dy, x, s, size=self.size, alpha=self.alpha, beta=self.beta), {}


@dataclass(frozen=True)
class MaxPool(_WithoutParameters):
    """Max pooling; overlapping where stride < size (paper, section 3.4)."""

    size: int
    stride: int

    def output_shape(self, shape: Shape) -> Shape:
        height, width, channels = shape
        return (height - self.size) // self.stride + 1, (width - self.size) // self.stride + 1, channels

    def forward(self, ops: ModuleType, parameters: Parameters, x: Array, run: Run) -> tuple[Array, Any]:
        y, winner = ops.maxpool_forward(x, size=self.size, stride=self.stride)
        return y, (winner, x.shape[1], x.shape[2])

    def backward(
        self, ops: ModuleType, parameters: Parameters, dy: Array, kept: Any, need_dx: bool
    ) -> tuple[Array | None, Parameters]:
        winner, height, width = kept
        dx = ops.maxpool_backward(dy, winner, height=height, width=width, size=self.size, stride=self.stride)
        return dx, {}


@dataclass(frozen=True)
class Flatten(_WithoutParameters):
    """(height, width, channels) -> features, in that order."""

    def output_shape(self, shape: Shape) -> Shape:
        height, width, channels = shape
        return (height * width * channels,)

    def forward(self, ops: ModuleType, parameters: Parameters, x: Array, run: Run) -> tuple[Array, Any]:
        return x.reshape(x.shape[0], -1), x.shape

    def backward(
        self, ops: ModuleType, parameters: Parameters, dy: Array, kept: Any, need_dx: bool
    ) -> tuple[Array | None, Parameters]:
        return dy.reshape(kept), {}


@dataclass(frozen=True)
class Dropout(_WithoutParameters):
    """Dropout (paper, section 4.2); ``number`` tells the masks of the network's dropout layers apart.

    With ``scale_in_training`` the surviving units are divided by ``keep`` in training (Caffe); without, all units
    are multiplied by ``keep`` at test time (the paper).
    """

    number: int
    keep: float
    scale_in_training: bool

    def forward(self, ops: ModuleType, parameters: Parameters, x: Array, run: Run) -> tuple[Array, Any]:
        if not run.training:
            return (x if self.scale_in_training else x * self.keep), None
        key = (run.seed, run.step, self.number)
        return ops.dropout_forward(x, keep=self.keep, scale=self._scale, key=key, first=run.first), (key, run.first)

    def backward(
        self, ops: ModuleType, parameters: Parameters, dy: Array, kept: Any, need_dx: bool
    ) -> tuple[Array | None, Parameters]:
        if kept is None:  # a test pass
            return (dy if self.scale_in_training else dy * self.keep), {}
        key, first = kept
        return ops.dropout_backward(dy, keep=self.keep, scale=self._scale, key=key, first=first), {}

    @property
    def _scale(self) -> float:
        return 1 / self.keep if self.scale_in_training else 1.0


@dataclass(frozen=True)
class ConvBlock:
    """Convolution, ReLU, and where present LRN and max pooling, as one operation of the backend.

    The ReLU follows the convolution, or with ``relu_last`` the pooling.
    """

    conv: Conv
    lrn: Lrn | None
    pool: MaxPool | None
    relu_last: bool = False

    def output_shape(self, shape: Shape) -> Shape:
        shape = self.conv.output_shape(shape)
        return self.pool.output_shape(shape) if self.pool else shape

    def parameter_shapes(self, shape: Shape) -> dict[str, Shape]:
        return self.conv.parameter_shapes(shape)

    @property
    def names(self) -> tuple[str, ...]:
        return self.conv.names

    @property
    def _options(self) -> dict[str, Any]:
        # All their fields, so that one more than backends know of is an error and not forgotten.
        lrn = astuple(self.lrn) if self.lrn else None
        pool = astuple(self.pool) if self.pool else None
        return {**self.conv.geometry, "lrn": lrn, "pool": pool}

    def forward(self, ops: ModuleType, parameters: Parameters, x: Array, run: Run) -> tuple[Array, Any]:
        w, b = parameters[f"{self.conv.name}.w"], parameters[f"{self.conv.name}.b"]
        forward = ops.conv_block_relu_last_forward if self.relu_last else ops.conv_block_forward
        return forward(x, w, b, **self._options, training=run.training)

    def backward(
        self, ops: ModuleType, parameters: Parameters, dy: Array, kept: Any, need_dx: bool
    ) -> tuple[Array | None, Parameters]:
        w = parameters[f"{self.conv.name}.w"]
        backward = ops.conv_block_relu_last_backward if self.relu_last else ops.conv_block_backward
        dx, dw, db = backward(dy, kept, w, **self._options, need_dx=need_dx)
        return dx, {f"{self.conv.name}.w": dw, f"{self.conv.name}.b": db}


@dataclass(frozen=True)
class LinearBlock:
    """Fully connected layer and ReLU as one operation of the backend."""

    linear: Linear

    def output_shape(self, shape: Shape) -> Shape:
        return self.linear.output_shape(shape)

    def parameter_shapes(self, shape: Shape) -> dict[str, Shape]:
        return self.linear.parameter_shapes(shape)

    @property
    def names(self) -> tuple[str, ...]:
        return self.linear.names

    def forward(self, ops: ModuleType, parameters: Parameters, x: Array, run: Run) -> tuple[Array, Any]:
        w, b = parameters[f"{self.linear.name}.w"], parameters[f"{self.linear.name}.b"]
        return ops.linear_block_forward(x, w, b, training=run.training)

    def backward(
        self, ops: ModuleType, parameters: Parameters, dy: Array, kept: Any, need_dx: bool
    ) -> tuple[Array | None, Parameters]:
        dx, dw, db = ops.linear_block_backward(dy, kept, parameters[f"{self.linear.name}.w"], need_dx=need_dx)
        return dx, {f"{self.linear.name}.w": dw, f"{self.linear.name}.b": db}


def fuse(layers: Sequence[Layer], ops: ModuleType) -> tuple[Layer, ...]:
    """The same network with each run of layers that ``ops`` computes in one operation replaced by a block.

    A block computes these layers and nothing like them: a class derived from one of them stays on its own.
    """
    fused: list[Layer] = []
    rest = list(layers)
    while rest:
        layer = rest.pop(0)
        if type(layer) is Conv and _relu_next(rest) and hasattr(ops, "conv_block_forward"):
            rest.pop(0)
            # A pool that comes after something other than ReLU or LRN (block 2 of `original`) stays on its own.
            layer = ConvBlock(layer, _take(rest, Lrn), _take(rest, MaxPool))
        elif type(layer) is Conv and _relu_last(rest) and hasattr(ops, "conv_block_relu_last_forward"):
            layer = ConvBlock(layer, _take(rest, Lrn), _take(rest, MaxPool), relu_last=True)
            rest.pop(0)
        elif type(layer) is Linear and _relu_next(rest) and hasattr(ops, "linear_block_forward"):
            rest.pop(0)
            layer = LinearBlock(layer)
        fused.append(layer)
    return tuple(fused)


_Kind = TypeVar("_Kind")


def _relu_last(layers: list[Layer]) -> bool:
    """Whether [LRN,] max pooling and a ReLU follow."""
    after = layers[1:] if _next_is(layers, Lrn) else layers
    return _next_is(after, MaxPool) and _relu_next(after[1:])


def _relu_next(layers: list[Layer]) -> bool:
    return layers[:1] == [Relu()]  # not one with a slope or a limit, if there should ever be such a field


def _next_is(layers: list[Layer], kind: type) -> bool:
    return bool(layers) and type(layers[0]) is kind


def _take(layers: list[Layer], kind: type[_Kind]) -> _Kind | None:
    """The next layer, taken off the list, where it is of this kind."""
    if not _next_is(layers, kind):
        return None
    return cast(_Kind, layers.pop(0))
