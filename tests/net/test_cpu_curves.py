"""The verdict of ``bench.cpu_curves``: ours beside the distance of PyTorch's two runs."""

from __future__ import annotations

import numpy as np
import pytest

from bench.cpu_curves import report


def _curves(ours: float, seed: int = 0) -> dict[str, list[float]]:
    random = np.random.default_rng(seed)
    middle, apart = np.linspace(2.5, 2.0, 120), random.normal(0, 0.01, 120)
    return {
        "hand": list(middle + random.normal(0, ours, 120)),
        "torch": list(middle + apart),
        "torch-one": list(middle - apart),
    }


def test_a_curve_within_the_spread_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(_curves(0.005)) == 0
    assert "| 101 to 120 |" in capsys.readouterr().out, "the last, shorter window is shown"


@pytest.mark.parametrize("ours", [0.05, np.nan])
def test_a_curve_outside_of_it_fails(ours: float) -> None:
    assert report(_curves(ours)) == 1


def test_our_own_curve_must_not_depend_on_threads(capsys: pytest.CaptureFixture[str]) -> None:
    curves = _curves(0.005)
    assert report(curves | {"hand-one": list(curves["hand"])}) == 0
    assert report(curves | {"hand-one": [*curves["hand"][:-1], 2.0]}) == 1
    assert "others" in capsys.readouterr().out
