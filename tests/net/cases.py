"""Inputs that bring mistakes to light, one list for each operation, shared by the tests of all backends.

A backend's test needs a few lines::

    @pytest.mark.parametrize("case", cases.ALL, ids=str)
    def test_agrees_with_the_reference(case):
        cases.check(backend, case, tolerance=1e-5)

What is in them: odd sizes, height != width, one image, one channel, channel counts that fill no vector register,
ragged edges, ties, -0.0, infinities where they are legal, all values negative, NaN, LRN at alpha = 1, arrays that are
views of larger ones with rubbish in between, and AlexNet's own layers. :func:`check` runs each case twice, the first
time filled with NaN, so that a workspace which is reused without being cleaned shows.

Everything random comes from a seed made of the case's name: a case keeps its numbers when others come or go.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from net import reference

# Operations whose results are copies or single roundings of their inputs: every backend gives the same bits.
EXACT = {
    "relu_forward",
    "relu_backward",
    "maxpool_forward",
    "dropout_forward",
    "dropout_backward",
}


@dataclass(frozen=True)
class Strided:
    """An array that lies inside a larger one: ``base[index]``."""

    base: np.ndarray
    index: tuple[slice, ...]


@dataclass(frozen=True)
class Case:
    """One call of one operation: ``operation(*args, **kwargs)``.

    ``args`` are NumPy arrays (float32 where they are floats) or :class:`Strided`; ``kwargs`` numbers, or NumPy arrays
    where the operation takes an array there.
    """

    operation: str
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    nan: bool = False  # NaN among the inputs
    strided: bool = False
    layer: bool = False  # one of AlexNet's own layers: large

    def __str__(self) -> str:
        return f"{self.operation}: {self.name}"


def run(ops: ModuleType, case: Case, dtype: type = np.float32) -> tuple[np.ndarray | None, ...]:
    """Results of a case on a backend, as NumPy arrays; for ``sgd_update`` the changed w and v.

    ``dtype`` is the precision of the floats handed over; only the reference takes float64.
    """
    args = [_on(ops, a, dtype) for a in case.args]
    kwargs = {name: _on(ops, value, dtype) for name, value in case.kwargs.items()}
    result = getattr(ops, case.operation)(*args, **kwargs)
    if case.operation == "sgd_update":
        assert result is None
        result = (args[0], args[1])
    results = result if isinstance(result, tuple) else (result,)
    return tuple(None if r is None else ops.to_host(r) for r in results)


def host(a: Any) -> np.ndarray:
    """A case's array as NumPy sees it."""
    return a.base[a.index] if isinstance(a, Strided) else a


def check(ops: ModuleType, case: Case, tolerance: float = 1e-5) -> None:
    """Compare a backend with the reference in float64; raises AssertionError.

    The largest error may be ``tolerance`` times the largest value of the expected array. Operations in ``EXACT`` must
    give the same bits as the reference in float32. NaN must appear where the reference has it; only a convolution may
    let it spread further (a fast algorithm works on tiles).
    """
    exact = case.operation in EXACT
    with np.errstate(invalid="ignore", over="ignore"):
        expected = run(reference, case, np.float32 if exact else np.float64)
        run(ops, _poisoned(case))
        got = run(ops, case)
    assert len(got) == len(expected)
    for number, (g, e) in enumerate(zip(got, expected, strict=True)):
        where = f"{case}, result {number}"
        if e is None:
            assert g is None, where
        elif exact or e.dtype == np.uint8:
            assert g.dtype == e.dtype, where
            np.testing.assert_array_equal(g, e, err_msg=where)
        else:
            assert g.dtype == np.float32, where
            assert_close(g, e, tolerance, where, nan_may_spread=case.operation.startswith("conv"))


def assert_close(
    got: np.ndarray, expected: np.ndarray, tolerance: float, where: str = "", *, nan_may_spread: bool = False
) -> None:
    """max |got - expected| <= tolerance * max |expected|, with NaN and infinities in the same places."""
    assert got.shape == expected.shape, f"{where}: shape {got.shape}, not {expected.shape}"
    nan = np.isnan(expected)
    if nan_may_spread and nan.any():
        assert np.isnan(got[nan]).all(), f"{where}: a NaN was lost"
        nan = np.isnan(got)
        assert not nan.all() or np.isnan(expected).all(), f"{where}: NaN everywhere"
    else:
        np.testing.assert_array_equal(np.isnan(got), nan, err_msg=f"{where}: NaN in other places")
    infinite = np.isinf(expected) & ~nan
    np.testing.assert_array_equal(got[infinite], expected[infinite], err_msg=f"{where}: infinities")
    finite = ~nan & ~infinite
    if not finite.any():
        return
    error = np.abs(got[finite].astype(np.float64) - expected[finite]).max()
    bound = tolerance * np.abs(expected[finite]).max()
    assert error <= bound, f"{where}: largest error {error:.3e}, allowed {bound:.3e}"


def _on(ops: ModuleType, value: Any, dtype: type) -> Any:
    """A case's array on the device in the wanted precision; anything else as it is."""
    if isinstance(value, Strided):
        return _on(ops, value.base, dtype)[value.index]
    if isinstance(value, np.ndarray):
        return ops.asarray(value.astype(dtype) if value.dtype == np.float32 else value)
    if isinstance(value, tuple):  # a dropout key
        return tuple(_on(ops, v, dtype) for v in value)
    return value


def _poisoned(case: Case) -> Case:
    """The same call with NaN for every float, which fills a backend's workspaces with it."""

    def poison(a: Any) -> Any:
        if isinstance(a, Strided):
            return Strided(poison(a.base), a.index)
        return np.full_like(a, np.nan) if a.dtype == np.float32 else a

    return Case(case.operation, case.name, tuple(poison(a) for a in case.args), case.kwargs, nan=True)


# --- drawing -------------------------------------------------------------------------------------------------------


def random_for(name: str) -> np.random.Generator:
    """A generator whose seed is the name."""
    return np.random.default_rng(zlib.crc32(name.encode()))


class _Draw:
    """Random arrays of one case."""

    def __init__(self, name: str) -> None:
        self.random = random_for(name)

    def normal(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape, dtype=np.float32)

    def integers(self, low: int, high: int, *shape: int) -> np.ndarray:
        """Whole numbers low .. high - 1 as float32: many of them equal."""
        return self.random.integers(low, high, shape).astype(np.float32)


def strided(a: np.ndarray) -> Strided:
    """The same values as every other channel and an inner piece of a larger array filled with rubbish."""
    *outer, channels = a.shape
    shape = (*(n + 2 for n in outer), 2 * channels + 1)
    index = (*(slice(1, n + 1) for n in outer), slice(1, 2 * channels, 2))
    base = np.full(shape, 1e30 if a.dtype == np.float32 else 251, dtype=a.dtype)
    base[index] = a
    return Strided(base, index)


def _with_nan(a: np.ndarray, *places: tuple[int, ...]) -> np.ndarray:
    a = a.copy()
    for place in places:
        a[place] = np.nan
    return a


# --- convolution ---------------------------------------------------------------------------------------------------

#            name                        n   h   w  cin kh kw cout stride pad groups
_CONV = {
    "odd, 3x3": (3, 9, 7, 5, 3, 3, 7, 1, 1, 1),
    "even, 3x3": (2, 8, 12, 4, 3, 3, 8, 1, 1, 1),
    "two groups, 5x5, pad 2": (2, 8, 11, 6, 5, 5, 10, 1, 2, 2),
    "two groups, 3x3": (3, 7, 5, 10, 3, 3, 6, 1, 1, 2),
    "two groups of one channel": (2, 6, 5, 2, 3, 3, 2, 1, 1, 2),
    "11x11, stride 4, ragged": (2, 23, 30, 3, 11, 11, 5, 4, 0, 1),
    "stride 2, pad 1, ragged, two groups": (2, 10, 7, 4, 3, 3, 6, 2, 1, 2),
    "5x5, stride 2, pad 1": (3, 14, 11, 3, 5, 5, 5, 2, 1, 1),
    "3x3, 48 maps": (3, 11, 9, 5, 3, 3, 48, 1, 1, 1),
    "stride 2, pad 2": (1, 9, 12, 3, 3, 3, 4, 2, 2, 1),
    "stride 4, pad 2, groups 2": (1, 13, 18, 4, 5, 5, 4, 4, 2, 2),
    "stride above kernel": (2, 11, 9, 3, 2, 2, 3, 3, 0, 1),
    "kernel 3x2": (2, 6, 8, 3, 3, 2, 4, 1, 0, 1),
    "1x1": (2, 5, 3, 3, 1, 1, 4, 1, 0, 1),
    "kernel as large as the picture": (2, 5, 5, 3, 5, 5, 4, 1, 0, 1),
    "one image, one channel, one map": (1, 4, 6, 1, 3, 3, 1, 1, 1, 1),
    "one pixel": (1, 1, 1, 3, 3, 3, 2, 1, 1, 1),
}

_CONV_LAYERS = {
    "conv1": (2, 227, 227, 3, 11, 11, 96, 4, 0, 1),
    "conv2": (2, 27, 27, 96, 5, 5, 256, 1, 2, 2),
    "conv3": (2, 13, 13, 256, 3, 3, 384, 1, 1, 1),
    "conv4": (2, 13, 13, 384, 3, 3, 384, 1, 1, 2),
    "conv5": (2, 13, 13, 384, 3, 3, 256, 1, 1, 2),
}


def _conv2d() -> Iterator[Case]:
    for name, numbers in (_CONV | _CONV_LAYERS).items():
        n, height, width, cin, kh, kw, cout, stride, pad, groups = numbers
        draw = _Draw(f"conv2d {name}")
        x, b = draw.normal(n, height, width, cin), draw.normal(cout)
        w = draw.normal(kh, kw, cin // groups, cout)
        dy = draw.normal(n, (height + 2 * pad - kh) // stride + 1, (width + 2 * pad - kw) // stride + 1, cout)
        geometry = {"stride": stride, "pad": pad, "groups": groups}
        layer = name in _CONV_LAYERS
        yield Case("conv2d_forward", name, (x, w, b), geometry, layer=layer)
        yield Case("conv2d_backward", name, (dy, x, w), {**geometry, "need_dx": True}, layer=layer)
        if name in ("conv1", "odd, 3x3", "two groups, 5x5, pad 2"):
            yield Case(
                "conv2d_backward", f"{name}, without dx", (dy, x, w), {**geometry, "need_dx": False}, layer=layer
            )
        if name in ("two groups, 5x5, pad 2", "odd, 3x3", "11x11, stride 4, ragged"):
            views = f"{name}, views"
            yield Case("conv2d_forward", views, (strided(x), strided(w), strided(b)), geometry, strided=True)
            yield Case("conv2d_backward", views, (strided(dy), strided(x), strided(w)), geometry, strided=True)
            x, dy = _with_nan(x, (0, 1, 2, 0)), _with_nan(dy, (0, 0, 1, 1))
            yield Case("conv2d_forward", f"{name}, NaN", (x, w, b), geometry, nan=True)
            yield Case("conv2d_backward", f"{name}, NaN", (dy, x, w), geometry, nan=True)


# --- ReLU ----------------------------------------------------------------------------------------------------------


def _relu() -> Iterator[Case]:
    draw = _Draw("relu")
    special = np.array([0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, np.nan, 3e38, -3e38], dtype=np.float32)
    for name, x in {
        "odd": draw.normal(3, 5, 7, 11),
        "one element": draw.normal(1, 1, 1, 1),
        "flat": draw.normal(2, 4097),
        "many zeros": draw.integers(-1, 2, 2, 7, 5, 13),
        "special values": special.reshape(1, 9),
    }.items():
        nan = bool(np.isnan(x).any())
        dy, y = draw.normal(*x.shape), reference.relu_forward(x)
        yield Case("relu_forward", name, (x,), nan=nan)
        yield Case("relu_backward", name, (dy, y), nan=nan)
    x, dy = draw.normal(2, 3, 5, 7), draw.normal(2, 3, 5, 7)
    yield Case("relu_forward", "views", (strided(x),), strided=True)
    yield Case("relu_backward", "views", (strided(dy), strided(x)), strided=True)


# --- normalisations ------------------------------------------------------------------------------------------------


def _norm(operation: str, name: str, x: np.ndarray, numbers: dict[str, float], **flags: bool) -> Iterator[Case]:
    """Forward and backward of one input; the backward pass gets the reference's s."""
    forward, backward = getattr(reference, f"{operation}_forward"), f"{operation}_backward"
    # At alpha = 1 random gradients keep both terms of the backward pass about equally large.
    dy = _Draw(f"{operation} {name} dy").normal(*x.shape)
    s = forward(x, **numbers)[1]
    rest = {key: value for key, value in numbers.items() if key != "k"}
    yield Case(f"{operation}_forward", name, (x,), numbers, **flags)
    yield Case(backward, name, (dy, x, s), rest, **flags)
    if flags.get("strided") is None and "size 5, alpha 1" in name:
        yield Case(f"{operation}_forward", f"{name}, views", (strided(x),), numbers, strided=True)
        yield Case(backward, f"{name}, views", (strided(dy), strided(x), strided(s)), rest, strided=True)


def _lrn() -> Iterator[Case]:
    for name, shape, size, k, alpha, beta in (
        ("size 5, alpha 1", (2, 5, 7, 16), 5, 2.0, 1.0, 0.75),
        ("size 4, alpha 1", (2, 5, 7, 16), 4, 2.0, 1.0, 0.75),
        ("size 3, alpha 1, odd", (3, 3, 5, 11), 3, 1.0, 1.0, 0.75),
        ("size 1", (2, 3, 4, 6), 1, 1.0, 1.0, 0.75),
        ("size 7", (2, 3, 4, 9), 7, 1.5, 0.5, 0.75),
        ("beta 0.5", (2, 3, 5, 8), 5, 1.0, 1.0, 0.5),
        ("beta 1", (2, 3, 5, 8), 5, 1.0, 1.0, 1.0),
        ("paper", (2, 7, 5, 96), 5, 2.0, 1e-4, 0.75),
        ("fewer channels than the window", (2, 3, 4, 3), 5, 2.0, 1.0, 0.75),
        ("one channel, one image", (1, 4, 3, 1), 5, 2.0, 1.0, 0.75),
        ("two channels", (2, 4, 3, 2), 4, 2.0, 1.0, 0.75),
        ("33 channels", (1, 5, 3, 33), 5, 1.0, 1.0, 0.75),
        ("256 channels", (2, 3, 5, 256), 5, 1.0, 1.0, 0.75),
        ("one pixel", (1, 1, 1, 24), 5, 1.0, 1.0, 0.75),
    ):
        x = _Draw(f"lrn {name}").normal(*shape) * np.float32(50 if alpha < 0.1 else 1)
        yield from _norm("lrn", name, x, {"size": size, "k": k, "alpha": alpha, "beta": beta})
    x = _with_nan(_Draw("lrn NaN").normal(2, 3, 4, 16), (0, 1, 2, 7), (1, 0, 0, 0), (1, 2, 3, 15))
    yield from _norm("lrn", "NaN", x, {"size": 5, "k": 2.0, "alpha": 1.0, "beta": 0.75}, nan=True)


def _map_norm() -> Iterator[Case]:
    for name, shape, size, k, alpha, beta in (
        ("size 5, alpha 1", (2, 9, 7, 6), 5, 1.0, 1.0, 0.75),
        ("size 4, alpha 1", (2, 6, 9, 5), 4, 2.0, 1.0, 0.75),
        ("size 3", (3, 5, 8, 3), 3, 1.0, 0.5, 0.75),
        ("size 1", (1, 4, 3, 2), 1, 1.0, 1.0, 0.75),
        ("beta 0.5", (2, 5, 6, 8), 5, 1.0, 1.0, 0.5),
        ("window larger than the picture", (2, 3, 2, 5), 5, 1.0, 1.0, 0.75),
        ("one pixel", (1, 1, 1, 4), 5, 1.0, 1.0, 0.75),
        ("original, block 2", (1, 27, 27, 32), 5, 1.0, 0.001 / 25, 0.75),
    ):
        x = _Draw(f"map norm {name}").normal(*shape) * np.float32(50 if alpha < 0.1 else 1)
        yield from _norm("map_norm", name, x, {"size": size, "k": k, "alpha": alpha, "beta": beta})
    x = _with_nan(_Draw("map norm NaN").normal(2, 7, 8, 5), (0, 0, 0, 1), (0, 3, 4, 2), (1, 6, 7, 4))
    yield from _norm("map_norm", "NaN", x, {"size": 5, "k": 2.0, "alpha": 1.0, "beta": 0.75}, nan=True)


# --- max pooling ---------------------------------------------------------------------------------------------------


def _maxpool() -> Iterator[Case]:
    draw = _Draw("maxpool")
    nan = draw.normal(2, 7, 9, 5)
    nan[0, :3, :3, 0] = np.nan
    nan[0, 4, 4, :] = np.nan
    nan[1, 2:4, 5, 2] = np.nan
    infinite = draw.integers(0, 2, 2, 7, 7, 3)
    infinite[0] = -np.inf
    infinite[1, 3:, :, 1] = np.inf
    for name, x, size, stride in (
        ("3/2, odd", draw.normal(3, 9, 7, 5), 3, 2),
        ("3/2, ragged", draw.normal(2, 8, 10, 6), 3, 2),
        ("3/2, all negative", -1 - np.abs(draw.normal(2, 7, 9, 4)), 3, 2),
        ("3/2, ties", draw.integers(0, 3, 3, 11, 9, 17), 3, 2),
        ("3/2, all equal", np.full((2, 7, 5, 3), 0.5, dtype=np.float32), 3, 2),
        ("3/2, zeros of both signs", np.where(draw.normal(2, 7, 5, 8) < 0, -0.0, 0.0).astype(np.float32), 3, 2),
        ("3/2, many zeros", np.maximum(draw.normal(2, 9, 9, 33) - 1, 0), 3, 2),
        ("3/2, one image, one channel", draw.normal(1, 5, 7, 1), 3, 2),
        ("3/2, one window", draw.normal(2, 3, 4, 7), 3, 2),
        ("3/2, 96 channels", draw.normal(2, 13, 11, 96), 3, 2),
        ("3/1", draw.integers(0, 4, 2, 6, 8, 5), 3, 1),
        ("3/3", draw.normal(2, 10, 7, 4), 3, 3),
        ("2/2, ragged", draw.integers(0, 3, 2, 7, 6, 9), 2, 2),
        ("2/3, gaps", draw.normal(2, 8, 9, 4), 2, 3),
        ("1/1", draw.normal(2, 3, 4, 5), 1, 1),
        ("5/2", draw.integers(0, 9, 2, 9, 11, 3), 5, 2),
        ("3/2, NaN", nan, 3, 2),
        ("3/2, infinities", infinite, 3, 2),
    ):
        y, winner = reference.maxpool_forward(x, size=size, stride=stride)
        dy = _Draw(f"maxpool {name} dy").normal(*y.shape)
        window = {"size": size, "stride": stride}
        sides = {"height": x.shape[1], "width": x.shape[2]}
        yield Case("maxpool_forward", name, (x,), window, nan="NaN" in name)
        yield Case("maxpool_backward", name, (dy, winner), {**sides, **window})
        if name == "3/2, ties":
            yield Case("maxpool_forward", f"{name}, views", (strided(x),), window, strided=True)
            views = (strided(dy), strided(winner))
            yield Case("maxpool_backward", f"{name}, views", views, {**sides, **window}, strided=True)


# --- fully connected -----------------------------------------------------------------------------------------------


def _linear() -> Iterator[Case]:
    for name, n, cin, cout in (
        ("odd", 5, 37, 11),
        ("one image", 1, 300, 7),
        ("one input", 3, 1, 5),
        ("one output", 3, 17, 1),
        ("one of all", 1, 1, 1),
        ("wide", 3, 9, 1000),
        ("deep", 2, 9216, 33),
    ):
        draw = _Draw(f"linear {name}")
        x, w, b, dy = draw.normal(n, cin), draw.normal(cin, cout), draw.normal(cout), draw.normal(n, cout)
        yield Case("linear_forward", name, (x, w, b))
        yield Case("linear_backward", name, (dy, x, w), {"need_dx": True})
        if name == "odd":
            yield Case("linear_backward", f"{name}, without dx", (dy, x, w), {"need_dx": False})
            yield Case("linear_forward", f"{name}, views", (strided(x), strided(w), strided(b)), strided=True)
            views = (strided(dy), strided(x), strided(w))
            yield Case("linear_backward", f"{name}, views", views, {"need_dx": True}, strided=True)
            x, dy = _with_nan(x, (1, 3)), _with_nan(dy, (2, 5))
            yield Case("linear_forward", f"{name}, NaN", (x, w, b), nan=True)
            yield Case("linear_backward", f"{name}, NaN", (dy, x, w), {"need_dx": True}, nan=True)


# --- dropout -------------------------------------------------------------------------------------------------------


def _dropout() -> Iterator[Case]:
    for name, shape, keep, scale, key in (
        ("half", (7, 4099), 0.5, 1.0, (0, 0, 6)),
        ("half, scaled", (7, 129), 0.5, 2.0, (1, 3, 7)),
        ("0.4, scaled", (5, 7, 3, 2), 0.4, 2.5, (2**32 + 5, 17, 6)),
        ("keep all", (3, 65), 1.0, 1.0, (4, 2, 7)),
        ("keep nearly none", (3, 4096), 2**-10, 1.0, (4, 2, 7)),
        ("one element", (1, 1), 0.5, 1.0, (9, 1, 6)),
        ("three elements", (1, 3), 0.5, 1.0, (9, 1, 6)),
        ("five elements", (5, 1), 0.5, 1.0, (9, 1, 6)),
        ("step above 32 bits", (3, 333), 0.5, 1.0, (12345, 2**32 + 7, 6)),
        ("largest seed and step", (3, 333), 0.5, 1.0, (2**64 - 1, 2**63, 7)),
        ("step in an array", (3, 333), 0.5, 1.0, (0, np.array([2**32 + 41], dtype=np.uint64), 7)),
    ):
        x = _Draw(f"dropout {name}").normal(*shape)
        yield Case("dropout_forward", name, (x,), {"keep": keep, "scale": scale, "key": key})
        yield Case("dropout_backward", name, (x,), {"keep": keep, "scale": scale, "key": key})
        if name == "half, scaled":
            for first in (1, 64, np.array([3], dtype=np.uint64)):  # rows of 129: the first block is shared with a row
                rest = {"keep": keep, "scale": scale, "key": key, "first": first}
                yield Case("dropout_forward", f"{name}, from row {first}", (x,), rest)
                yield Case("dropout_backward", f"{name}, from row {first}", (x,), rest)
            rest = {"keep": keep, "scale": scale, "key": key}
            yield Case("dropout_forward", f"{name}, views", (strided(x),), rest, strided=True)
            yield Case("dropout_backward", f"{name}, views", (strided(x),), rest, strided=True)


# --- loss ----------------------------------------------------------------------------------------------------------


def _loss() -> Iterator[Case]:
    draw = _Draw("loss")
    ties = draw.integers(0, 2, 5, 7)
    for name, z in {
        "odd": draw.normal(5, 13),
        "1000 classes": draw.normal(3, 1000),
        "one image": draw.normal(1, 10),
        "one class": draw.normal(4, 1),
        "two classes": draw.normal(4, 2),
        "large scores": 1e4 * draw.normal(6, 11),
        "all negative": -1e3 - np.abs(draw.normal(4, 9)),
        "ties": ties,
        "all equal": np.zeros((3, 10), dtype=np.float32),
        "certain": np.eye(5, 9, dtype=np.float32) * 200,
        "one score of minus infinity": _set(draw.normal(3, 6), (1, 2), -np.inf),
        "NaN": _with_nan(draw.normal(4, 9), (1, 3), (2, 0)),
        "129 images": draw.normal(129, 17),
    }.items():
        nan = bool(np.isnan(z).any())
        # Not the label with minus infinity: its loss is infinite, which is another matter.
        labels = draw.random.integers(0, z.shape[1], len(z)).astype(np.int32)
        if name == "one score of minus infinity":
            labels[1] = 0
        yield Case("softmax", name, (z,), nan=nan)
        yield Case("cross_entropy", name, (z, labels), nan=nan)
        if name == "odd":
            yield Case("softmax", "views", (strided(z),), strided=True)
            yield Case("cross_entropy", "views", (strided(z), labels), strided=True)


def _set(a: np.ndarray, place: tuple[int, ...], value: float) -> np.ndarray:
    a = a.copy()
    a[place] = value
    return a


# --- update --------------------------------------------------------------------------------------------------------


def _sgd_update() -> Iterator[Case]:
    for name, shape, lr, momentum, decay in (
        ("paper", (3, 3, 5, 7), 0.01, 0.9, 5e-4),
        ("visible decay", (11, 13), 0.1, 0.9, 0.5),
        ("bias, no decay", (7,), 0.02, 0.9, 0.0),
        ("no momentum", (9, 5), 0.1, 0.0, 0.3),
        ("one element", (1,), 0.1, 0.5, 0.5),
        ("rate 0", (5, 3), 0.0, 0.9, 5e-4),
        ("large", (100_003,), 0.25, 0.9, 0.1),
        ("rate in an array", (4, 7), np.array([0.125], dtype=np.float32), 0.9, 0.25),
    ):
        draw = _Draw(f"sgd {name}")
        w, v, dw = draw.normal(*shape), draw.normal(*shape), draw.normal(*shape)
        numbers = {"lr": lr, "momentum": momentum, "decay": decay}
        yield Case("sgd_update", name, (w, v, dw), numbers)
        if name == "visible decay":
            yield Case("sgd_update", "NaN", (w, v, _with_nan(dw, (3, 4))), numbers, nan=True)


# --- augment -------------------------------------------------------------------------------------------------------


def _augment() -> Iterator[Case]:
    for name, n, height, width, mean_side, scale, bgr, border in (
        ("no mean", 3, 7, 9, None, 1 / 255, False, (2, 1)),
        ("no mean, BGR, no border", 4, 5, 8, None, 1.0, True, (0, 0)),
        ("mean larger than the crop", 5, 7, 9, 13, 1.0, False, (2, 1)),
        ("mean larger than the crop, BGR", 5, 9, 6, 13, 0.5, True, (0, 3)),
        ("mean as large as the crop", 4, 11, 11, 11, 1 / 1.1, False, (0, 3)),
        ("mean as large as the crop, BGR", 3, 6, 6, 6, 1.0, True, (1, 0)),
        ("one image, one pixel", 1, 1, 1, 3, 1.0, False, (0, 0)),
        ("paper's sizes", 2, 224, 224, 256, 1.0, False, (2, 1)),
    ):
        draw = _Draw(f"augment {name}")
        random = draw.random
        images = random.integers(0, 256, (n, height, width, 3)).astype(np.uint8)
        images.flat[0], images.flat[-1] = 0, 255
        reach = (mean_side - height + 1, mean_side - width + 1) if mean_side else (33, 33)
        corner = np.stack([random.integers(0, r, n) for r in reach], axis=1).astype(np.int32)
        corner[0] = (reach[0] - 1, reach[1] - 1)
        flip = (np.arange(n) % 2 == 0).astype(np.uint8)
        shift = draw.normal(n, 3) * np.float32(10)
        # Nothing symmetric in the mean: mirrored or moved wrongly it must show.
        mean = np.abs(draw.normal(mean_side, mean_side, 3)) * np.float32(100) if mean_side else None
        yield Case(
            "augment",
            name,
            (images, corner, flip, shift),
            {"mean": mean, "scale": scale, "bgr": bgr, "border": border},
        )


_MAKERS: tuple[Callable[[], Iterator[Case]], ...] = (
    _augment,
    _conv2d,
    _relu,
    _lrn,
    _map_norm,
    _maxpool,
    _linear,
    _dropout,
    _loss,
    _sgd_update,
)


def _all() -> list[Case]:
    with np.errstate(invalid="ignore"):
        return [case for maker in _MAKERS for case in maker()]


ALL: list[Case] = _all()


def of(*operations: str) -> list[Case]:
    """The cases of some operations."""
    return [case for case in ALL if case.operation in operations]
