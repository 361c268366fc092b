"""From a configuration to what training and evaluation work with: network, input, loader, rates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Final

import numpy as np

from net.alexnet import alexnet
from net.layers import Layer, Shape
from net.network import Preparation, parameter_shapes
from pipeline.checkpoint import Arrays
from pipeline.config import Config, Train, at_epoch
from pipeline.errors import PipelineError

_MOST_THREADS: Final = 12  # of the loader, unless asked for: more than one GPU can use
_RING: Final = 4 << 30  # bytes of batches that the loader's threads may fill at a time, unless asked for

# Names among a checkpoint's arrays; the others are the parameters'.
MEAN: Final = "mean"  # a mean picture: only imported weights bring their own
MOMENTUM: Final = "momentum/"  # before a parameter's name: its momentum


def network_layers(config: Config, classes: int) -> tuple[Layer, ...]:
    """The recipe's network as a plain list of layers (``net.layers.fuse`` adapts it to a backend)."""
    options = {k: v for k, v in vars(config.network).items() if k not in ("weight_std", "bias")}
    return alexnet(classes, **options)


def parameters_of(arrays: Arrays) -> Arrays:
    """Of a checkpoint's arrays the parameters."""
    return {name: array for name, array in arrays.items() if name != MEAN and not name.startswith(MOMENTUM)}


def shapes(layers: Sequence[Layer], config: Config) -> dict[str, Shape]:
    """The shapes of all parameters."""
    return parameter_shapes(layers, input_shape(config))


def require_memory(
    ops: ModuleType, layers: Sequence[Layer], config: Config, batch: int, *, training: bool, views: int = 1
) -> None:
    """Refuse a batch that the backend's device has no memory for, where the backend can tell."""
    if hasattr(ops, "check_memory"):
        try:
            ops.check_memory(layers, input_shape(config), batch, training=training, views=views)
        except MemoryError as error:
            raise PipelineError(str(error)) from error


def loader_threads(config: Config, ops: ModuleType, crops: int) -> int:
    """The loader's threads for batches of ``crops``: as the settings say, else what suits the backend.

    The host's cores compute, unless the backend has a device of its own; that one takes more crops than a core can cut.
    """
    if config.loader.threads is not None:
        return config.loader.threads
    if not hasattr(ops, "replayable"):
        return 1
    room = _RING // (crops * config.input.crop**2 * 3)  # each thread fills a batch of its own
    return max(1, min(_MOST_THREADS, _cores() * 3 // 4, room))


def loader_slots(config: Config, threads: int) -> int:
    """Batches in training's ring: as the settings say, else one a thread, and three that wait or are in use."""
    return threads + 3 if config.loader.slots is None else config.loader.slots


def _cores() -> int:
    """Cores that this process, one of perhaps several ranks on a machine, may keep busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = os.environ.get("NUMBA_NUM_THREADS", "")  # pipeline.mpi shares the cores out by it
    return min(cores, int(share)) if share.isdecimal() else cores


def preparation(config: Config, mean: np.ndarray, ops: ModuleType, *, jittered: bool) -> Preparation:
    """How the backend turns crops into input; ``jittered`` is whether colour shifts are being drawn."""
    inp = config.input
    if inp.mean == "none":
        device_mean = None
    elif inp.mean == "image":
        device_mean = ops.asarray(mean)
    else:
        device_mean = ops.asarray(centre(mean, inp.crop))
    scale = inp.scale / (1 + inp.jitter) if jittered and inp.jitter_rescale else inp.scale
    return Preparation(device_mean, scale, inp.bgr, inp.border)


def centre(picture: np.ndarray, side: int) -> np.ndarray:
    """The middle ``side`` rows and columns of a square picture, contiguous."""
    first = (picture.shape[0] - side) // 2
    return np.ascontiguousarray(picture[first : first + side, first : first + side])


def jittered(config: Config, epoch: int) -> bool:
    """Whether training in this epoch draws colour shifts."""
    inp = config.input
    return inp.jitter > 0 and (inp.jitter_epochs is None or epoch < inp.jitter_epochs)


def learning_rate(train: Train, epoch: int) -> float:
    """The learning rate of the weights in this epoch: what training uses, and what its metrics name."""
    rate = at_epoch(train.lr, epoch)
    assert rate is not None  # checked when the configuration was read
    return rate


def learning_rates(config: Config, names: Sequence[str], epoch: int) -> np.ndarray:
    """The learning rate of each parameter in this epoch, float32."""
    train = config.train
    weights = learning_rate(train, epoch)
    biases = at_epoch(train.bias_lr, epoch)
    conv1 = at_epoch(train.conv1_lr, epoch)
    if biases is None:
        biases = weights * train.bias_lr_factor

    def rate(name: str) -> float:
        if conv1 is not None and name.startswith("conv1."):
            return conv1
        return biases if name.endswith(".b") else weights

    return np.array([rate(name) for name in names], dtype=np.float32)


def decays(config: Config, names: Sequence[str]) -> dict[str, float]:
    """The weight decay of each parameter."""
    train = config.train
    return {n: train.weight_decay if n.endswith(".w") or train.bias_decay else 0.0 for n in names}


def input_shape(config: Config) -> Shape:
    """(height, width, channels) of the network's input."""
    side = config.input.crop + sum(config.input.border)
    return side, side, 3
