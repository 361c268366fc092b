"""The reference against nested loops, number by number, on every case small enough for loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from net import reference
from tests.net import cases, oracle

LOOPS = 400_000  # innermost steps a case may cost


def _cost(case: cases.Case) -> int:
    """Innermost steps of the case's loops."""
    arrays = [cases.host(a) for a in case.args]
    if case.operation.startswith("conv2d"):
        w = arrays[1 if case.operation == "conv2d_forward" else 2]
        outputs = _outputs(case, w)
        return outputs * math.prod(w.shape[:3])
    if case.operation.startswith("linear"):
        return len(arrays[0]) * max(math.prod(a.shape) for a in arrays[1:])
    window = case.kwargs.get("size", 1)
    return max(a.size for a in arrays) * (window if "lrn" in case.operation else window**2)


def _outputs(case: cases.Case, w: np.ndarray) -> int:
    if case.operation == "conv2d_backward":
        return cases.host(case.args[0]).size
    x, stride, pad = cases.host(case.args[0]), case.kwargs["stride"], case.kwargs["pad"]
    sides = [(x.shape[1 + d] + 2 * pad - w.shape[d]) // stride + 1 for d in (0, 1)]
    return x.shape[0] * sides[0] * sides[1] * w.shape[3]


# The loops do not care where an array lies or how NaN spreads; NaN has its own tests below.
SMALL = [case for case in cases.ALL if not case.nan and not case.strided and _cost(case) <= LOOPS]


def test_the_loops_see_every_operation():
    operations = {case.operation for case in cases.ALL}
    assert {case.operation for case in SMALL} == operations
    assert len(SMALL) >= 0.7 * len([c for c in cases.ALL if not c.nan and not c.strided])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_float64_agrees_with_nested_loops(case):
    got = cases.run(reference, case, np.float64)
    expected = getattr(oracle, case.operation)(*(cases.host(a) for a in case.args), **case.kwargs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        if e is None:
            assert g is None
        else:
            assert g.dtype == (np.uint8 if e.dtype == np.uint8 else np.float64)
            cases.assert_close(g, e, 1e-12, str(case))


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_float32_stays_float32_and_agrees_with_float64(case):
    cases.check(reference, case, tolerance=2e-6)


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_arguments_are_not_modified(case):
    args = [cases.host(a).copy() for a in case.args]
    before = [a.copy() for a in args]
    with np.errstate(invalid="ignore", over="ignore"):
        getattr(reference, case.operation)(*args, **case.kwargs)
    changed = 2 if case.operation == "sgd_update" else 0
    for a, b in zip(args[changed:], before[changed:], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", [c for c in cases.ALL if c.strided], ids=str)
def test_views_give_the_same_as_contiguous_arrays(case):
    contiguous = cases.Case(case.operation, case.name, tuple(cases.host(a).copy() for a in case.args), case.kwargs)
    for viewed, plain in zip(cases.run(reference, case), cases.run(reference, contiguous), strict=True):
        np.testing.assert_allclose(viewed, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_lrn_window_is_the_papers(size):
    """One channel lit: s differs from k exactly in the channels within size // 2."""
    channels, lit = 9, 3
    x = np.zeros((1, 1, 1, channels))
    x[..., lit] = 2.0
    _, s = reference.lrn_forward(x, size=size, k=1.0, alpha=0.25, beta=0.75)
    expected = [2.0 if abs(i - lit) <= size // 2 else 1.0 for i in range(channels)]
    assert s.reshape(-1).tolist() == expected


def test_nan_passes_relu():
    x = np.array([np.nan, -1.0, 0.0, 2.0])
    np.testing.assert_array_equal(reference.relu_forward(x), [np.nan, 0.0, 0.0, 2.0])


@pytest.mark.parametrize("place", range(9))
def test_nan_wins_the_pool_and_the_first_of_several(place):
    x = np.full((1, 3, 3, 1), np.inf)
    x.reshape(-1)[place:] = np.nan
    y, winner = reference.maxpool_forward(x, size=3, stride=2)
    assert np.isnan(y).all()
    assert winner.item() == place


@pytest.mark.parametrize("place", range(9))
def test_the_first_of_equal_maxima_wins_the_pool(place):
    x = np.zeros((1, 3, 3, 1))
    x.reshape(-1)[place:] = 1.0
    y, winner = reference.maxpool_forward(x, size=3, stride=2)
    assert (y.item(), winner.item()) == (1.0, place)


def test_a_pixel_that_wins_several_windows_collects_all_their_gradients():
    x = np.zeros((1, 5, 5, 1))
    x[0, 2, 2, 0] = 1.0  # in all four 3/2 windows
    _, winner = reference.maxpool_forward(x, size=3, stride=2)
    dy = np.array([1.0, 10.0, 100.0, 1000.0]).reshape(1, 2, 2, 1)
    dx = reference.maxpool_backward(dy, winner, height=5, width=5, size=3, stride=2)
    assert dx[0, 2, 2, 0] == 1111.0
    assert dx.sum() == 1111.0


def test_nan_reaches_the_loss_of_its_image_and_no_other():
    z = np.zeros((3, 4), dtype=np.float32)
    z[1, 2] = np.nan
    loss, dz = reference.cross_entropy(z, np.array([0, 0, 0], dtype=np.int32))
    assert np.isnan(loss).tolist() == [False, True, False]
    assert np.isnan(dz).all(axis=1).tolist() == [False, True, False]


def test_a_network_that_knows_nothing_has_a_loss_of_log_classes():
    loss, _ = reference.cross_entropy(np.zeros((2, 1000)), np.array([3, 999]))
    np.testing.assert_allclose(loss, 6.907755, rtol=1e-6)


def test_shifting_all_scores_changes_no_probability():
    z = cases.random_for("shift").standard_normal((3, 7))
    np.testing.assert_allclose(reference.softmax(z + 1000), reference.softmax(z), rtol=1e-10)
    np.testing.assert_allclose(reference.softmax(z).sum(axis=1), 1, rtol=1e-12)


def test_the_learning_rate_stands_inside_the_velocity():
    """With lr 0 the velocity built up before still moves the weights; v <- m v + g, w <- w - lr v would stand still."""
    w, v = np.zeros(1), np.zeros(1)
    reference.sgd_update(w, v, np.ones(1), lr=0.5, momentum=0.5, decay=0.0)
    reference.sgd_update(w, v, np.ones(1), lr=0.0, momentum=0.5, decay=0.0)
    assert (w.item(), v.item()) == (-0.75, -0.25)


def test_a_rate_in_an_array_is_the_number_in_it():
    draw = cases.random_for("rate")
    w, v, dw = (draw.standard_normal(5) for _ in range(3))
    one, other = (w.copy(), v.copy()), (w.copy(), v.copy())
    reference.sgd_update(*one, dw, lr=0.25, momentum=0.9, decay=0.1)
    reference.sgd_update(*other, dw, lr=np.array([0.25], dtype=np.float32), momentum=0.9, decay=0.1)
    np.testing.assert_array_equal(one, other)


def test_augment_leaves_the_border_zero_and_puts_the_crop_inside():
    images = np.full((1, 4, 6, 3), 7, dtype=np.uint8)
    y = reference.augment(
        images,
        np.zeros((1, 2), dtype=np.int32),
        np.zeros(1, dtype=np.uint8),
        np.ones((1, 3), dtype=np.float32),
        mean=None,
        scale=0.5,
        bgr=False,
        border=(2, 1),
    )
    assert y.shape == (1, 7, 9, 3)
    inside = np.zeros((7, 9), dtype=bool)
    inside[2:6, 2:8] = True
    assert (y[0, inside] == 4).all()
    assert (y[0, ~inside] == 0).all()


def test_upload_and_asarray_copy():
    host = {"a": np.zeros(3, dtype=np.float32)}
    device, single = reference.upload(host)["a"], reference.asarray(host["a"])
    back = reference.to_host(device)
    host["a"][:] = 1
    device += 2
    assert single.tolist() == [0, 0, 0]
    assert device.tolist() == [2, 2, 2]
    assert back.tolist() == [0, 0, 0]
    assert reference.host_empty((2, 3), np.uint8).shape == (2, 3)
    assert reference.empty((2, 3), np.int32).dtype == np.int32
    reference.synchronize()
