"""A list of layers put to work: initial parameters, forward, backward, the training step, and prediction.

Everything here goes through the operations of a backend (``ops``), so this file is the same for the textbook
reference, the CPU and the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import numpy as np

from net.layers import Array, Layer, Parameters, Run, Shape

_LINE: Final = 64  # bytes of a cache line

# Gradients as they become known -> their sums over all processes
Reduce = Callable[[Iterable[tuple[str, Array]]], Iterator[tuple[str, Array]]]


@dataclass(frozen=True)
class Preparation:
    """How uint8 crops become the network's input; arguments of ``augment`` (``net/reference/augment.py``)."""

    mean: Array | None  # float32 (M, M, 3), 0..255, on the backend's device
    scale: float  # factor on (pixel - mean + shift)
    bgr: bool  # blue, green, red instead of red, green, blue
    border: tuple[int, int]  # zero rows and columns before and after the crop


@dataclass(frozen=True)
class Descent:
    """The numbers of stochastic gradient descent that do not change from step to step (paper, section 5)."""

    momentum: float
    decay: dict[str, float]  # weight decay of each parameter
    frozen: frozenset[str] = frozenset()  # parameters that stay as they are


def parameter_shapes(layers: Sequence[Layer], shape: Shape) -> dict[str, Shape]:
    """Shapes of all parameters, in the order of the layers, for an input of (height, width, channels).

    Raises
    ------
    ValueError
        The layers do not fit each other or the input, or two have parameters of one name.
    """
    shapes: dict[str, Shape] = {}
    for layer in layers:
        own, output = layer.parameter_shapes(shape), layer.output_shape(shape)
        if own.keys() & shapes.keys():
            raise ValueError(f"two layers have parameters named {', '.join(own)}; each needs a name of its own")
        if min(output) < 1:
            raise ValueError(f"nothing is left of {shape} after {layer}; take a larger input")
        shapes |= own
        shape = output
    return shapes


def zeros(shapes: dict[str, Shape]) -> dict[str, np.ndarray]:
    """float32 arrays of zeros on the host, laid out so that a backend can compute with them as they are (``adopt``).

    Each begins with a cache line. The system's fresh memory holds zeros: none of it is touched here.
    """
    arrays = {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        spare = np.zeros(count + _LINE // 4, dtype=np.float32)
        first = -spare.ctypes.data % _LINE // 4
        arrays[name] = spare[first : first + count].reshape(shape)
    return arrays


def initial_parameters(
    shapes: dict[str, Shape],
    weight_std: Sequence[float],
    bias: Sequence[float],
    seed: int,
) -> dict[str, np.ndarray]:
    """Draw the initial weights and set the initial biases (paper, section 5), as arrays like those of :func:`zeros`.

    ``weight_std`` and ``bias`` have a number for each layer. Weights are normal with mean 0 and the layer's standard
    deviation; where that is given as 0 it is sqrt(2 / fan-in), fan-in being how many products an output adds up. This
    keeps the mean square of the ReLUs' outputs the same from layer to layer (He et al., 2015). Each tensor has its own
    random stream, so its values depend on the seed and its place in ``shapes`` alone.

    Raises
    ------
    ValueError
        ``weight_std`` or ``bias`` has not one number for each layer.
    """
    with drawing(shapes, weight_std, bias, seed) as drawn:
        return drawn()


@contextmanager
def drawing(
    shapes: dict[str, Shape], weight_std: Sequence[float], bias: Sequence[float], seed: int
) -> Iterator[Callable[[], dict[str, np.ndarray]]]:
    """Draw the initial parameters beside what the with-block does; the function it gets waits for them."""
    # With one too few or too many, layers would begin with what is meant for their neighbours.
    if not len(weight_std) == len(bias) == len(shapes) / 2:
        raise ValueError(
            f"{len(shapes) // 2} layers with parameters, but {len(weight_std)} weight_std and {len(bias)} bias"
        )
    parameters = zeros(shapes)

    def draw(number: int, name: str) -> None:
        array, layer = parameters[name], number // 2
        if name.endswith(".b"):
            array[...] = bias[layer]
            return
        fan_in = int(np.prod(array.shape[:-1]))
        std = weight_std[layer] or (2 / fan_in) ** 0.5
        random = np.random.Generator(np.random.Philox(key=[seed, number]))
        random.standard_normal(dtype=np.float32, out=array)
        array *= np.float32(std)

    # Sixty million draws take most of a second on one core, and each tensor's are its own affair. More than half are
    # fc6's and decide when the last is done, so the large tensors come first.
    numbered = sorted(enumerate(parameters), key=lambda item: parameters[item[1]].size, reverse=True)
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(draw, number, name) for number, name in numbered]

        def drawn() -> dict[str, np.ndarray]:
            for future in futures:
                future.result()
            return parameters

        yield drawn


def forward(
    ops: ModuleType, layers: Sequence[Layer], parameters: Parameters, x: Array, run: Run
) -> tuple[Array, list[Any]]:
    """The network's output for the batch x, and what each layer keeps for the backward pass, in the layers' order.

    For AlexNet x is (N, 227, 227, 3) and the output the scores (N, classes), both float32. Nothing is kept unless
    ``run.training``.
    """
    tape = []
    for layer in layers:
        x, kept = layer.forward(ops, parameters, x, run)
        if run.training:
            tape.append(kept)
    return x, tape


def backward(
    ops: ModuleType,
    layers: Sequence[Layer],
    parameters: Parameters,
    dz: Array,
    tape: list[Any],
    frozen: AbstractSet[str] = frozenset(),
) -> Iterator[tuple[str, Array]]:
    """From dz (N, classes), the gradient of the scores, to the gradients of all parameters, last layer first.

    A generator of (name, gradient of the parameter's shape). Each is handed out as soon as it is known, with the
    gradient of the layer's input already computed, so the receiver may update that parameter at once. ``tape`` is what
    :func:`forward` kept; it is emptied on the way, which frees memory. Parameters in ``frozen`` are left out, and
    nothing is computed below the lowest layer that has others.
    """
    dy = dz
    lowest = next((n for n, layer in enumerate(layers) if not set(layer.names) <= frozen), len(layers))  # that learns
    for number in reversed(range(lowest, len(layers))):
        dy, gradients = layers[number].backward(ops, parameters, dy, tape.pop(), number > lowest)
        yield from ((name, gradient) for name, gradient in gradients.items() if name not in frozen)
    tape.clear()


def training_step(
    ops: ModuleType,
    layers: Sequence[Layer],
    parameters: Parameters,
    momenta: Parameters,
    preparation: Preparation,
    descent: Descent,
    seed: int,
    reduce: Reduce | None = None,
) -> Callable[[dict[str, Array]], Array]:
    """One step of training as a function of the batch: augment, forward, loss, backward, update.

    The returned function takes device arrays ``images``, ``corner``, ``flip``, ``shift``, ``labels`` (see the
    backend's ``augment`` and ``cross_entropy``), ``rates`` (the learning rate of each parameter, float32, in the
    order of ``parameters``) and ``step`` (uint64, one element, which with ``seed`` decides the dropout masks). It
    updates ``parameters`` and ``momenta`` (the velocities v of ``sgd_update``) in place and returns each image's loss,
    float32 (N,).

    Where several processes share a batch, ``reduce`` turns each one's gradients into their sums over all. The inputs
    then have ``first`` (uint64, one element, the place of its first picture in the batch) and ``share`` (float32, one
    element, its part of the batch's pictures, such as 1/4): the batch's gradient is the sum of each part's mean times
    its share.
    """
    position = {name: number for number, name in enumerate(parameters)}

    def step(inputs: dict[str, Array]) -> Array:
        x = prepare(ops, preparation, inputs)
        run = Run(training=True, seed=seed, step=inputs["step"], first=inputs.get("first", 0))
        scores, tape = forward(ops, layers, parameters, x, run)
        loss, dz = ops.cross_entropy(scores, inputs["labels"])
        del x, scores
        dz = dz if reduce is None else dz * inputs["share"]
        gradients = backward(ops, layers, parameters, dz, tape, descent.frozen)
        for name, gradient in gradients if reduce is None else reduce(gradients):
            rate = inputs["rates"][position[name] : position[name] + 1]
            ops.sgd_update(
                parameters[name],
                momenta[name],
                gradient,
                lr=rate,
                momentum=descent.momentum,
                decay=descent.decay[name],
            )
        return loss

    # A recording would have to hold the exchange as well.
    return ops.replayable(step) if hasattr(ops, "replayable") and reduce is None else step


def prediction(
    ops: ModuleType, layers: Sequence[Layer], parameters: Parameters, preparation: Preparation, views: int
) -> Callable[[dict[str, Array]], Array]:
    """Class probabilities of a batch as a function of its crops (paper, section 4.1).

    The returned function takes the device arrays ``images``, ``corner``, ``flip``, ``shift``, the ``views`` crops of
    a picture next to each other, and returns the softmax averaged over them, float32 (pictures, classes). Between its
    calls ``parameters`` may be changed by ``sgd_update`` and by nothing else: a backend may keep what it has derived
    from them.
    """
    if hasattr(ops, "fixed"):
        parameters = ops.fixed(parameters)

    def predict(inputs: dict[str, Array]) -> Array:
        x = prepare(ops, preparation, inputs)
        scores, _ = forward(ops, layers, parameters, x, Run(training=False))
        probabilities = ops.softmax(scores)
        return probabilities.reshape(-1, views, probabilities.shape[1]).mean(axis=1)

    return ops.replayable(predict) if hasattr(ops, "replayable") else predict


def prepare(ops: ModuleType, preparation: Preparation, inputs: dict[str, Array]) -> Array:
    """uint8 crops and their draws -> the network's input, float32 (N, height, width, 3)."""
    return ops.augment(
        inputs["images"],
        inputs["corner"],
        inputs["flip"],
        inputs["shift"],
        mean=preparation.mean,
        scale=preparation.scale,
        bgr=preparation.bgr,
        border=preparation.border,
    )
