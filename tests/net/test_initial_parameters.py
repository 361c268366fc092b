"""Initial parameters: the values a seed stands for, and how they are drawn beside other work."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from net.network import drawing, initial_parameters

SHAPES = {"conv1.w": (3, 3, 2, 8), "conv1.b": (8,), "fc.w": (200, 300), "fc.b": (300,)}
STD, BIAS, SEED = (0.05, 0.0), (0.0, 1.0), 11


def expected() -> dict[str, np.ndarray]:
    """Each tensor from the stream of its own place, in one thread, in the order of its elements."""
    stds = {"conv1.w": 0.05, "fc.w": (2 / 200) ** 0.5}
    arrays = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        if name in stds:
            random = np.random.Generator(np.random.Philox(key=[SEED, number]))
            arrays[name] = random.standard_normal(shape, dtype=np.float32) * np.float32(stds[name])
        else:
            arrays[name] = np.full(shape, BIAS[number // 2], np.float32)
    return arrays


def test_the_values_are_those_of_the_seed_to_the_last_bit() -> None:
    drawn = initial_parameters(SHAPES, STD, BIAS, SEED)
    assert list(drawn) == list(SHAPES), "the order of the layers, in which learning rates are given"
    for name, values in expected().items():
        assert drawn[name].dtype == np.float32
        np.testing.assert_array_equal(drawn[name], values, name)


def test_they_are_drawn_while_the_caller_does_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, let_go, philox = threading.Event(), threading.Event(), np.random.Philox

    def held(**key: object) -> np.random.Philox:
        begun.set()
        assert let_go.wait(60)
        return philox(**key)

    monkeypatch.setattr(np.random, "Philox", held)
    with drawing(SHAPES, STD, BIAS, SEED) as drawn:
        assert begun.wait(60), "nothing is drawn before the values are asked for"
        let_go.set()
        values = drawn()
    for name, array in expected().items():
        np.testing.assert_array_equal(values[name], array, name)


def test_what_goes_wrong_in_a_draw_is_raised_where_the_values_are_asked_for() -> None:
    with drawing(SHAPES, STD, (0.0, "one"), SEED) as drawn, pytest.raises(ValueError, match="could not convert"):  # type: ignore[arg-type]
        drawn()


@pytest.mark.parametrize(("std", "bias"), [(STD, (0.0,)), (STD, (*BIAS, 0.0)), (STD[:1], BIAS), ((*STD, 0.1), BIAS)])
def test_a_number_for_each_layer_is_needed(std: tuple[float, ...], bias: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="2 layers with parameters, but"):
        initial_parameters(SHAPES, std, bias, SEED)
