"""What an exhibit is: one operation, its input, the right answer in float64, and the steps towards speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Step:
    """One way to compute it; ``why`` says what this one does that the one before does not."""

    name: str
    why: str
    function: Callable[[], np.ndarray]
    before: Callable[[], None] = lambda: None  # run before each call, not timed


@dataclass(frozen=True)
class Exhibit:
    title: str
    oracle: np.ndarray  # float64
    steps: tuple[Step, ...]
    tolerance: float  # of the largest error, relative to the oracle's largest value


@dataclass(frozen=True)
class Row:
    step: Step
    seconds: float
    error: float


def show(exhibit: Exhibit, rounds: int) -> list[Row]:
    """Check and time every step; the steps take turns, and the best of the rounds counts.

    Raises
    ------
    ValueError
        A step's result is further from the oracle than the exhibit allows.
    """
    largest = float(np.abs(exhibit.oracle).max())
    errors = []
    for step in exhibit.steps:  # the first call compiles
        step.before()
        error = float(np.abs(step.function().astype(np.float64) - exhibit.oracle).max()) / largest
        if not error <= exhibit.tolerance:
            raise ValueError(f"{exhibit.title}: {step.name} is off by {error:.1e} of the largest value")
        errors.append(error)
    best = [float("inf")] * len(exhibit.steps)
    for _ in range(rounds):
        for number, step in enumerate(exhibit.steps):
            step.before()
            start = time.perf_counter()
            step.function()
            best[number] = min(best[number], time.perf_counter() - start)
    return [Row(step, b, e) for step, b, e in zip(exhibit.steps, best, errors, strict=True)]
