"""Where a training step on the CPU spends its time, operation by operation: ``python -m bench.cpu_layers``.

Runs the step of the ``seed`` recipe (1000 classes) on random crops with every operation of ``net.cpu`` timed, and
prints the median of each with its share of the step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

import net.cpu
from bench import command
from bench.cpu_sides import sides
from net.backend import FUSED_OPERATIONS, OPERATIONS
from pipeline.command_line import at_least_one


def timed_backend(times: dict[str, list[float]]) -> SimpleNamespace:
    """``net.cpu`` with every operation writing its seconds to ``times``, under its name and its shapes."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds = time.perf_counter() - start
            # The weights tell the layers apart: last of a backward pass's arrays, before the bias in a forward pass.
            shapes = [a.shape for a in args if isinstance(a, np.ndarray) and a.ndim > 1]
            label = f"{name} {' '.join(map(str, shapes[-1]))}" if shapes else name
            times.setdefault(label, []).append(seconds)
            return result

        return call

    names = [*OPERATIONS, *(name for name in FUSED_OPERATIONS if hasattr(net.cpu, name))]
    return SimpleNamespace(**{name: timed(name, getattr(net.cpu, name)) for name in names})


def main() -> int:
    parser = command("cpu_layers", __doc__)
    parser.add_argument("--batch", type=at_least_one, default=128)
    parser.add_argument("--rounds", type=at_least_one, default=5)
    options = parser.parse_args()
    times: dict[str, list[float]] = {}
    inputs, functions = sides(timed_backend(times), options.batch)
    step = functions["train"]
    step(inputs)  # compiles, and fills the memory pool
    times.clear()
    whole = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        step(inputs)
        whole.append(time.perf_counter() - start)
    total = statistics.median(whole)
    for name, values in times.items():
        calls = len(values) // options.rounds
        seconds = statistics.median(sum(values[i : i + calls]) for i in range(0, len(values), calls))
        print(f"{name:48} {seconds * 1e3:8.1f} ms {seconds / total:7.1%}")
    print(f"{'whole step':48} {total * 1e3:8.1f} ms, {options.batch / total:.1f} images/s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
