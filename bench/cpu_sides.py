"""What the CPU benchmarks share: the seed recipe's network on random crops, through one backend's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.parity import batches
from net.layers import fuse
from net.network import Descent, initial_parameters, training_step
from pipeline.config import RECIPES
from stages.setup import decays, learning_rates, network_layers, preparation, shapes

CLASSES = 1000
Host = dict[str, np.ndarray]


def training_of(ops: Any, batch: int, classes: int) -> tuple[Host, Callable[[Host], Any]]:
    """A batch of random crops, and a function that trains the seed recipe's network on it for one step."""
    config = RECIPES["seed"]
    layers = network_layers(config, classes)
    start = initial_parameters(shapes(layers, config), (0.0,) * 8, config.network.bias, seed=0)
    names = list(start)
    parameters = {name: ops.asarray(value) for name, value in start.items()}
    momenta = {name: ops.asarray(np.zeros_like(value)) for name, value in start.items()}
    prepared = preparation(config, np.zeros((256, 256, 3), dtype=np.float32), ops, jittered=True)
    descent = Descent(config.train.momentum, decays(config, names))
    step = training_step(ops, fuse(layers, ops), parameters, momenta, prepared, descent, seed=0)
    inputs = next(batches(config, classes, batch, 1, seed=0))
    # A hundredth of the recipe's rate: random labels are learnt by heart, and the figures must stay finite.
    inputs |= {"rates": learning_rates(config, names, 0) * np.float32(0.01), "step": np.zeros(1, dtype=np.uint64)}
    return inputs, lambda host: step(ops.upload(host))
