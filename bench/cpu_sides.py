"""The contestants of ``bench.cpu``, each in a process of its own, as bare loops on the same random crops.

    python -m bench.cpu_sides eager train --steps 3 --batch 128

prints one line of JSON with the seconds of each call after the first. ``hand`` is this project, ``eager`` and
``compile`` are PyTorch; ``train`` is a whole training step, ``forward`` a prediction, both of the seed recipe's network
with 1000 classes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import command
from bench.blotches import batches
from bench.hand import begin
from net.network import initial_parameters, prediction
from pipeline.command_line import at_least_one
from pipeline.config import RECIPES, Config
from stages.setup import learning_rates, network_layers, shapes

CLASSES = 1000
Host = dict[str, np.ndarray]


def sides(ops: Any, batch: int) -> tuple[Host, dict[str, Callable[[Host], Any]]]:
    """A batch of random crops, and the training step and the prediction of ``ops`` on it."""
    config = RECIPES["seed"]
    hand = begin(ops, config, CLASSES, start(config), np.zeros((256, 256, 3), dtype=np.float32))
    predict = prediction(ops, hand.layers, hand.parameters, hand.prepared, views=1)
    return crops(batch), {
        "train": lambda host: hand.step(ops.upload(host)),
        "forward": lambda host: predict(ops.upload(host)),
    }


def start(config: Config) -> Host:
    """The parameters all contestants begin with."""
    return initial_parameters(shapes(network_layers(config, CLASSES), config), (0.0,) * 8, config.network.bias, seed=0)


def crops(batch: int) -> Host:
    """Random crops and draws, and what a training step needs besides."""
    config = RECIPES["seed"]
    names = list(shapes(network_layers(config, CLASSES), config))
    # A hundredth of the recipe's rate: random labels are learnt by heart, and the figures must stay finite.
    rates = learning_rates(config, names, 0) * np.float32(0.01)
    return next(batches(config, CLASSES, batch, 1, seed=0)) | {"rates": rates, "step": np.zeros(1, dtype=np.uint64)}


def torch_side(mode: str, kind: str) -> Callable[[Host], Any]:
    import torch

    from bench.gpu_torch import MODES
    from bench.gpu_torch import prediction as torch_prediction
    from bench.gpu_torch import training as torch_training

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    how = next(m for m in MODES if (m.compiled == "default" if mode == "compile" else m.name == "eager"))
    config = RECIPES["seed"]
    if kind == "train":
        return torch_training(how, "fp32", "cpu", start(config), CLASSES, 0.5, config.input.scale)
    return torch_prediction(how, "fp32", "cpu", start(config), CLASSES, config.input.scale, 1)


def main() -> int:
    parser = command("cpu_sides", __doc__)
    parser.add_argument("side", choices=("hand", "eager", "compile"))
    parser.add_argument("kind", choices=("train", "forward"))
    parser.add_argument("--steps", type=at_least_one, default=3)
    parser.add_argument("--batch", type=at_least_one, default=128)
    options = parser.parse_args()
    if options.side == "hand":
        import net.cpu

        inputs, functions = sides(net.cpu, options.batch)
        function = functions[options.kind]
    else:
        inputs, function = crops(options.batch), torch_side(options.side, options.kind)
    times = []
    for _ in range(options.steps + 1):
        begun = time.perf_counter()
        function(inputs)
        times.append(time.perf_counter() - begun)
    print(json.dumps(times[1:]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
