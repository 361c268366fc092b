"""The CPU's smaller operations beside the reference's NumPy, in turns: ``python -m bench.cpu_small [--rounds 15]``.

They are a hundredth of a training step together. Prints a table: the best time of each side, in milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from bench import command
from net import reference
from pipeline.command_line import at_least_one


def operations(ops: ModuleType) -> dict[str, Callable[[], Any]]:
    """Each operation on random arrays of the network's sizes."""
    random = np.random.default_rng(0)
    wide, block2 = (random.standard_normal(s, dtype=np.float32) for s in ((16, 55, 55, 96), (16, 27, 27, 256)))
    units, scores = (random.standard_normal(s, dtype=np.float32) for s in ((128, 4096), (128, 1000)))
    norm = {"size": 5, "alpha": 0.001 / 25, "beta": 0.75}
    sums = reference.map_norm_forward(block2, k=1.0, **norm)[1]
    labels = random.integers(0, 1000, 128).astype(np.int32)
    crops = random.integers(0, 256, (128, 224, 224, 3), dtype=np.uint8)
    corner, flip = random.integers(0, 33, (128, 2)).astype(np.int32), random.integers(0, 2, 128).astype(np.uint8)
    shift, mean = random.standard_normal((128, 3), dtype=np.float32), random.random((256, 256, 3), dtype=np.float32)
    how = {"mean": mean, "scale": 1.0, "bgr": False, "border": (2, 1)}
    return {
        "ReLU of conv1's output, 16 images, forward": lambda: ops.relu_forward(wide),
        "ReLU, backward": lambda: ops.relu_backward(wide, wide),
        "map norm of block 2, 16 images, forward": lambda: ops.map_norm_forward(block2, k=1.0, **norm),
        "map norm, backward": lambda: ops.map_norm_backward(block2, block2, sums, **norm),
        "augment, 128 crops of 224 x 224, with a mean picture": lambda: ops.augment(crops, corner, flip, shift, **how),
        "dropout, 128 x 4096": lambda: ops.dropout_forward(units, keep=0.5, scale=1.0, key=(0, 0, 6)),
        "softmax, loss and its gradient, 128 x 1000": lambda: ops.cross_entropy(scores, labels),
    }


def main() -> int:
    parser = command("cpu_small", __doc__)
    parser.add_argument("--rounds", type=at_least_one, default=15, help="turns each side takes")
    rounds = parser.parse_args().rounds
    import net.cpu

    print("| operation | NumPy, ms | here, ms |\n|---|---|---|")
    sides = [list(operations(ops).items()) for ops in (reference, net.cpu)]
    for (name, by_numpy), (_, here) in zip(*sides, strict=True):
        times: list[list[float]] = [[], []]
        for turn in range(rounds + 1):
            for side, call in zip(times, (by_numpy, here), strict=True):
                start = time.perf_counter()
                call()
                if turn:  # the first one compiles
                    side.append(1000 * (time.perf_counter() - start))
        print(f"| {name} | {min(times[0]):.2f} | {min(times[1]):.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
