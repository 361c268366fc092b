"""The museum of kernels: every step of every exhibit is right, and a wrong one is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench.kernels.__main__ import EXHIBITS
from bench.kernels.exhibit import show


@pytest.mark.parametrize("name", EXHIBITS)
def test_every_step_is_right(name: str) -> None:
    exhibit = EXHIBITS[name](64)
    rows = show(exhibit, rounds=1)
    assert [row.step for row in rows] == list(exhibit.steps)


def test_a_wrong_step_is_refused() -> None:
    exhibit = EXHIBITS["pool"](64)
    right = exhibit.steps[0].function
    wrong = replace(exhibit.steps[0], function=lambda: right() * np.float32(1.001))
    with pytest.raises(ValueError, match="is off by"):
        show(replace(exhibit, steps=(wrong,)), rounds=1)
