"""This project's network on a backend, with a training step as ``--stage train`` takes it, for a bench to time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from net.layers import Array, Layer, Parameters, fuse
from net.network import Descent, Preparation, Reduce, training_step
from pipeline.config import Config
from stages.setup import decays, network_layers, preparation


@dataclass(frozen=True)
class Hand:
    """A network in training: its fused layers, its parameters on the device, and what computes a step."""

    layers: tuple[Layer, ...]
    parameters: Parameters
    prepared: Preparation
    step: Callable[[dict[str, Array]], Array]


def begin(
    ops: ModuleType,
    config: Config,
    classes: int,
    start: dict[str, np.ndarray],
    mean: np.ndarray,
    seed: int = 0,
    reduce: Reduce | None = None,
) -> Hand:
    """Training that begins with the parameters ``start``, in their precision, on pictures of this mean."""
    layers = fuse(network_layers(config, classes), ops)
    parameters = {name: ops.asarray(value) for name, value in start.items()}
    momenta = {name: ops.asarray(np.zeros_like(value)) for name, value in start.items()}
    prepared = preparation(config, mean, ops, jittered=config.input.jitter > 0)
    descent = Descent(config.train.momentum, decays(config, list(start)))
    step = training_step(ops, layers, parameters, momenta, prepared, descent, seed, reduce)
    return Hand(layers, parameters, prepared, step)
