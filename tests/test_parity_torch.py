"""Training steps beside PyTorch's: exactly the same in float64, and as close as rounding allows in float32."""

from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import replace

import numpy as np
import pytest

if importlib.util.find_spec("torch") is None:
    if os.environ.get("CI"):
        raise RuntimeError("PyTorch is needed to compare with it: pip install '.[bench]'")
    pytest.skip("PyTorch is not installed: pip install '.[bench]'", allow_module_level=True)

import torch

from bench import cpu_curves, parity
from net.layers import Linear


def on_pictures_of(side, config):
    """The same layers on smaller pictures; ``python -m bench.parity`` takes them at their full size."""
    return replace(config, input=replace(config.input, crop=side - sum(config.input.border)))


@pytest.fixture
def narrow(monkeypatch):
    """fc6 and fc7 with few units: what is computed is the same, and 4096 make nine tenths of the time."""
    layers = parity.network_layers

    def narrowed(config, classes):
        return tuple(
            replace(layer, units=64) if isinstance(layer, Linear) and layer.units == 4096 else layer
            for layer in layers(config, classes)
        )

    monkeypatch.setattr(parity, "network_layers", narrowed)


@pytest.mark.parametrize("recipe", ["seed", "paper", "original", "caffe"])
def test_in_float64_nothing_but_rounding_differs(recipe, narrow):
    """Every layer, option and rate of the recipes."""
    config = on_pictures_of(67, parity.comparable(recipe))
    measured = parity.measure(config, "reference", classes=7, batch=3, steps=2, precision=np.float64)
    assert measured.ours.parameters["conv1.w"].dtype == np.float64
    assert measured.theirs.parameters["conv1.w"].dtype == np.float64
    assert measured.parity.loss <= 1e-12
    for name, value in measured.parity.gradients.items():
        assert value <= 1e-11, name
    # What the steps did to a parameter, not the parameter, most of which is its start.
    for name, value in measured.parity.changes.items():
        assert value <= 1e-10, name


@pytest.mark.parametrize(("recipe", "steps"), [("paper", 12), ("caffe", 50)])
def test_steps_in_float32(recipe, steps, request):
    """Few with the layers' own widths, fifty with narrow ones; ``python -m bench.parity`` makes fifty of the former."""
    if steps == 50:
        request.getfixturevalue("narrow")
    config = on_pictures_of(131, parity.comparable(recipe, rate=1e-5))
    measured = parity.measure(config, "cpu", classes=10, batch=2, steps=steps)
    assert len(measured.ours.losses) == steps
    assert parity.broken(measured.parity, measured.start) == []


def test_the_curves_of_both_sides_begin_alike(prepared):
    """``bench.cpu_curves`` in small: the same pictures, crops, masks and updates, so that rounding alone differs."""
    options = argparse.Namespace(run=prepared, recipe=None, steps=4, batch=4, rate=0.01)
    threads = torch.get_num_threads()
    try:
        ours, theirs = (cpu_curves.curve(side, options) for side in ("hand", "torch-one"))
    finally:
        torch.set_num_threads(threads)
    assert len(theirs) == 4
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert np.ptp(ours) > 1e-2  # the steps do something


def test_a_bound_that_does_not_hold_is_named():
    start = {"conv1.w": np.ones(3, dtype=np.float32), "conv1.b": np.zeros(3, dtype=np.float32)}
    moved = {"conv1.w": np.full(3, 2.0, dtype=np.float32), "conv1.b": np.full(3, 0.5, dtype=np.float32)}
    theirs = parity.Trace(np.array([1.0, 2.0]), moved, moved)

    def found(losses, parameters):
        ours = parity.Trace(np.array(losses), moved, parameters)
        return [line.split(",")[0] for line in parity.broken(parity.compare(start, ours, theirs), start)]

    assert found([1.0, 2.0], moved) == []
    assert found([1.0, 2.1], moved) == ["loss 5.0e-02"]
    assert found([1.0, np.nan], moved) == ["loss nan"]
    still = found([1.0, 2.0], start)
    assert still == ["change of conv1.w 1.0e+00", "conv1.w 5.0e-01", "change of conv1.b 1.0e+00"]
    near = {**moved, "conv1.w": np.full(3, 2.01, dtype=np.float32)}
    assert found([1.0, 2.0], near) == ["conv1.w 5.0e-03"]
