"""The CPU backend beside PyTorch on the same machine, in one run, alternated: ``python -m bench.cpu``.

Both compute the same network (1000 classes, groups, LRN, dropout) on the same random uint8 crops: a training step
(augment, forward, loss, backward, update) and a prediction. The loader is not part of either side. Each round times
one step of every contestant; the table gives medians over the rounds and ratios to PyTorch's eager mode.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_torch import MODES, Host
from bench.gpu_torch import prediction as torch_prediction
from bench.gpu_torch import training as torch_training
from bench.parity import batches
from net.backend import load
from net.layers import fuse
from net.network import Descent, initial_parameters, prediction, training_step
from pipeline.config import PAPER
from stages.setup import decays, learning_rates, network_layers, preparation, shapes

CLASSES = 1000
SCALE = 1 / 255


def contestants(batch: int, compiled: bool) -> tuple[Host, dict[str, dict[str, Callable[[Host], Any]]]]:
    """A batch, and for "training" and "forward" the functions to time, by name."""
    ops = load("cpu")
    config = PAPER
    layers = network_layers(config, CLASSES)
    start = initial_parameters(shapes(layers, config), (0.0,) * 8, config.network.bias, seed=0)
    names = list(start)
    parameters = {name: ops.asarray(value) for name, value in start.items()}
    momenta = {name: ops.asarray(np.zeros_like(value)) for name, value in start.items()}
    prepared = preparation(config, np.zeros((256, 256, 3), dtype=np.float32), ops, jittered=True)
    fused = fuse(layers, ops)
    step = training_step(
        ops, fused, parameters, momenta, prepared, Descent(config.train.momentum, decays(config, names)), seed=0
    )
    predict = prediction(ops, fused, parameters, prepared, views=1)
    inputs = next(batches(config, CLASSES, batch, 1, seed=0))
    inputs |= {"rates": learning_rates(config, names, 0) * np.float32(0.01), "step": np.zeros(1, dtype=np.uint64)}
    modes = [mode for mode in MODES[:1] + MODES[2:3] if compiled or mode.compiled is None]
    training: dict[str, Callable[[Host], Any]] = {"by hand": lambda host: step(ops.upload(host))}
    forward: dict[str, Callable[[Host], Any]] = {"by hand": lambda host: predict(ops.upload(host))}
    for mode in modes:
        name = f"PyTorch {mode.name}"
        training[name] = torch_training(mode, "fp32", "cpu", start, CLASSES, 0.5, SCALE)
        forward[name] = torch_prediction(mode, "fp32", "cpu", start, CLASSES, SCALE, 1)
    return inputs, {"training": training, "forward": forward}


def medians(functions: dict[str, Callable[[Host], Any]], inputs: Host, rounds: int) -> dict[str, float]:
    """Seconds a call of each function, taking turns; the first call of each is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function(inputs)
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which needs a C++ compiler")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    inputs, races = contestants(options.batch, not options.no_compile)
    table = {}
    for race, functions in races.items():
        seconds = medians(functions, inputs, options.rounds)
        peer = seconds["PyTorch eager"]
        for name, value in seconds.items():
            rate, ratio = options.batch / value, peer / value
            table[f"{race}, {name}"] = {"images_per_second": rate, "times_eager": ratio}
            print(f"{race:9} {name:32} {rate:8.1f} images/s {ratio:6.2f} x eager", flush=True)
    if options.json:
        facts = {
            "date": date.today().isoformat(),
            "machine": platform.processor() or platform.machine(),
            "threads": threads,
            "batch": options.batch,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "table": table,
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
