"""The convolutions whose columns are never stored, on Hopper's way to the tensor cores and on the other cards'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest

from net import reference
from net.alexnet import alexnet
from net.gpu import convolution, implicit, kernels
from net.layers import Conv
from tests.gpu import standin
from tests.gpu.conftest import REAL
from tests.gpu.shim import build
from tests.gpu.standin import round_to_bf16
from tests.net import cases


@dataclass(frozen=True)
class Case:
    name: str
    x: tuple[int, int, int, int]
    kernel: int
    maps: int
    stride: int = 1
    pad: int = 0
    groups: int = 2

    def __str__(self) -> str:
        return self.name

    @property
    def geometry(self) -> dict[str, int]:
        return {"stride": self.stride, "pad": self.pad, "groups": self.groups}


CASES = [
    Case("conv1", (3, 19, 15, 3), 11, 96, stride=4, groups=1),
    Case("conv2", (2, 9, 8, 96), 5, 256, pad=2),
    Case("conv4, several tiles of maps", (1, 5, 6, 64), 3, 272, pad=1),
    Case("few maps and channels", (2, 7, 6, 16), 3, 16, pad=1),
    Case("one pixel", (1, 3, 3, 16), 3, 32),
    Case("1x1", (2, 8, 9, 16), 1, 16),
    Case("border wider than the picture", (2, 1, 2, 16), 5, 16, pad=3),
    Case("three groups", (2, 6, 5, 24), 3, 48, pad=1, groups=3),
    Case("stride 2, odd", (2, 12, 9, 4), 5, 40, stride=2, groups=1),
    Case("the last window ends at the edge", (1, 16, 12, 8), 4, 8, stride=4, groups=1),
    Case("128 maps a group, many pixels", (12, 9, 8, 16), 3, 256, pad=1),
]
SMALL = [case for case in CASES if case.name in ("one pixel", "border wider than the picture", "stride 2, odd")]


@pytest.fixture(params=["Hopper", "Ampere"])
def ops(request: pytest.FixtureRequest, backend: Callable[[str], ModuleType]) -> Iterator[ModuleType]:
    """The backend in bfloat16 with the instructions of either generation; on a real card, with the card's own."""
    if REAL:
        if request.param != "Hopper":
            pytest.skip("a real card has its own instructions")
        yield backend("bf16")
        return
    before, standin.machine.capability = standin.machine.capability, {"Hopper": "90", "Ampere": "80"}[request.param]
    forget_kernels()
    yield backend("bf16")
    standin.machine.capability = before
    forget_kernels()
    backend("bf16")


def forget_kernels() -> None:
    kernels.compiled.cache_clear()
    kernels._module.cache_clear()


def draw(case: Case) -> tuple[np.ndarray, ...]:
    """x, w and dy with values that bfloat16 has, and b."""
    random = cases.random_for(case.name)
    shapes = (case.x, (case.kernel, case.kernel, case.x[3] // case.groups, case.maps), (case.maps,))
    x, w, b = (random.standard_normal(shape, dtype=np.float32) for shape in shapes)
    y = reference.conv2d_forward(x, w, b, **case.geometry)
    return round_to_bf16(x), round_to_bf16(w / 4), b, round_to_bf16(random.standard_normal(y.shape, dtype=np.float32))


def check(ops: ModuleType, case: Case) -> list[bytes]:
    """y, dx, dw and db against the reference; returns the bits."""
    x, w, b, dy = draw(case)
    assert implicit.suits(convolution.shape_of(x, w, **case.geometry))
    arrays = [ops.asarray(a) for a in (x, w, b)]
    y = ops.to_host(ops.conv2d_forward(*arrays, **case.geometry))
    expected = reference.conv2d_forward(x, w, b, **case.geometry)
    cases.assert_close(y, expected, 2.0**-7)  # rounded after the product and after the bias
    got = [ops.to_host(g) for g in ops.conv2d_backward(ops.asarray(dy), *arrays[:2], **case.geometry, need_dx=True)]
    wanted = reference.conv2d_backward(dy, x, w, **case.geometry, need_dx=True)
    # Where a stride was folded away dx goes by way of the columns, and is rounded once more.
    cases.assert_close(got[0], wanted[0], 2.0**-8 if case.stride == 1 else 2.0**-6)
    cases.assert_close(got[1], wanted[1], 1e-5)  # products of bfloat16 are exact in float32
    cases.assert_close(got[2], wanted[2], 1e-5)
    return [a.tobytes() for a in (y, *got)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(ops: ModuleType, case: Case) -> None:
    """Threads in random order; the other orders are in the next test."""
    before, build.settings.order = build.settings.order, "random"
    check(ops, case)
    build.settings.order = before


def test_the_order_of_the_threads_changes_no_bit(ops: ModuleType, pretended: standin.Machine) -> None:
    found = set()
    for order in build.ORDERS:
        build.settings.order = order
        found.add(tuple(check(ops, CASES[1])))
    assert len(found) == 1


@pytest.mark.parametrize("tile", implicit.TILES)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_every_tile_and_number_of_stages(
    ops: ModuleType, monkeypatch: pytest.MonkeyPatch, tile: int, stages: int
) -> None:
    if not implicit.fits(stages, tile, 2048, _current()):
        pytest.skip("this card has not so much shared memory")
    monkeypatch.setattr(implicit, "TILES", (tile, *((96,) if tile == 48 else ())))  # dw has no kernel for 48
    monkeypatch.setattr(implicit, "slices", lambda tile, beside, room: stages)
    if tile == 48:
        monkeypatch.setattr(implicit, "_cost", lambda plan, room: plan.tile)
    check(ops, CASES[1])
    check(ops, CASES[3])


def test_a_sum_in_parts(ops: ModuleType) -> None:
    """More pixels than one block's share, in stretches that end in the middle of a picture."""
    case = Case("many pixels", (9, 13, 11, 16), 3, 16, pad=1)
    x, w, *_ = draw(case)
    plan = implicit.gradient_plan(convolution.shape_of(x, w, **case.geometry), _current())
    assert plan.count > 1
    check(ops, case)


def _current() -> implicit.Room:
    from net.gpu.device import current

    return current()


def test_bias_and_relu_in_the_same_pass(ops: ModuleType) -> None:
    case = CASES[3]
    x, w, b, _ = draw(case)
    arrays = [ops.asarray(a) for a in (x, w, b)]
    y, _ = ops.conv_block_forward(*arrays, **case.geometry, lrn=None, pool=None, training=False)
    expected = reference.relu_forward(reference.conv2d_forward(x, w, b, **case.geometry))
    cases.assert_close(ops.to_host(y), expected, 2.0**-8)


def test_nan_reaches_the_windows_that_have_it_and_no_others(ops: ModuleType) -> None:
    case = CASES[1]
    x, w, b, _ = draw(case)
    x[1, 4, 4, 70] = np.nan  # of the second group
    y = ops.to_host(ops.conv2d_forward(*(ops.asarray(a) for a in (x, w, b)), **case.geometry))
    seen = np.isnan(y).all(axis=3, where=np.arange(256) >= 128)
    expected = np.zeros(seen.shape, bool)
    expected[1, 2:7, 2:7] = True
    np.testing.assert_array_equal(seen, expected)
    assert not np.isnan(y[..., :128]).any()


def test_which_layers_of_alexnet_go_this_way(ops: ModuleType) -> None:
    chosen, size = [], (227, 227, 3)
    for layer in alexnet(1000):
        if isinstance(layer, Conv):
            w = np.empty(layer.parameter_shapes(size)[f"{layer.name}.w"], np.float32)
            shape = convolution.shape_of(np.empty((1, *size), np.uint8), w, **layer.geometry)
            chosen += [layer.name] if implicit.suits(replace(shape, images=128)) else []
            # A batch whose elements 32 bits cannot count goes through in pieces, by way of the columns.
            assert not implicit.suits(replace(shape, images=100_000))
        size = layer.output_shape(size)
    assert chosen == ["conv1", "conv2", "conv4", "conv5"]


@dataclass(frozen=True)
class Card:
    processors: int
    shared_processor: int


@pytest.mark.parametrize("card", [Card(132, 228 * 1024), Card(128, 100 * 1024), Card(108, 164 * 1024)])
def test_plans_fit_the_card(card: Card) -> None:
    conv2 = convolution.ConvShape(128, 27, 27, 96, 5, 5, 256, 1, 2, 2)
    for plan in (
        implicit.product_plan(conv2, conv2.pixels, card),
        implicit.product_plan(implicit.backwards(conv2), 27 * 27, card),
        implicit.gradient_plan(conv2, card),
    ):
        assert plan.stages >= 2
        assert plan.shared + 1024 <= card.shared_processor
        assert plan.blocks * plan.count > 0.9 * card.processors  # hardly a processor is left without work


def test_other_precisions_do_without(backend: Callable[[str], ModuleType]) -> None:
    x, w, *_ = draw(CASES[1])
    shape = convolution.shape_of(x, w, **CASES[1].geometry)
    for precision in ("fp32", "tf32"):
        backend(precision)
        assert not implicit.suits(shape)


# --- the tests see mistakes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    name: str
    old: str
    new: str
    caught_by: Case = CASES[1]
    generation: str = "Hopper"

    def __str__(self) -> str:
        return self.name


MANY = Case("many pixels", (9, 13, 11, 16), 3, 16, pad=1)
MISTAKES = [
    Mistake("no barrier before a slice is used", "    publish();\n    __syncthreads();", "    publish();"),
    Mistake("no barrier before results are staged", "    wait_groups<0>();\n    __syncthreads();",
            "    wait_groups<0>();"),
    Mistake("no barrier before results leave", "value);\n            }\n    }\n    __syncthreads();",
            "value);\n            }\n    }"),
    Mistake("a row too far", "row < height && col", "row <= height && col"),
    Mistake("outside is not zero", "inside ? from[v].bits : 0", "from[v].bits", CASES[3]),
    Mistake("the second panel is the first", "to + piece / 8 * PANEL + place_in_panel(row, piece % 8),",
            "to + place_in_panel(row, piece % 8),"),
    Mistake("corners of the wrong slice", "corners[slice % 2 * DEPTH + row + j * DOWN]",
            "corners[row + j * DOWN]", MANY),
    Mistake("one part is forgotten", "p < parts; p++", "p < parts - 1; p++", MANY),
    Mistake("the kernel is not turned", "(taps - 1 - tap)", "tap"),
    Mistake("the folded picture's last row", "min(s, height - first)", "min(s, height - first - 1)", CASES[0]),
    Mistake("the folded window's edge", "kw < kernel_w ? w[", "kw <= kernel_w ? w[", CASES[0]),
    Mistake("pieces are exchanged at writing only", "left + place_in_panel(m + lane % 16, k / 8 + lane / 16)",
            "left + (m + lane % 16) * 64 + k + lane / 16 * 8", generation="Ampere"),
    Mistake("operands of other terms", "term = k + lane / 16 * 8 + lane % 8", "term = k + lane % 16",
            generation="Ampere"),
    Mistake("a lane's second row is its first", "a[i / 2 + k / 8 * 2], k)", "a[i / 2 + k / 8], k)",
            generation="Ampere"),
]  # fmt: skip


@pytest.mark.parametrize(("ops", "mistake"), [(m.generation, m) for m in MISTAKES], ids=str, indirect=["ops"])
def test_a_mistake_is_caught(
    ops: ModuleType, pretended: standin.Machine, monkeypatch: pytest.MonkeyPatch, mistake: Mistake
) -> None:
    original = {file: kernels.source(file) for file in kernels.sources()}
    file = next((f for f in ("implicit", "fold") if mistake.old in original[f]), None)
    assert file is not None, "the text to break is no longer there"
    broken = {**original, file: original[file].replace(mistake.old, mistake.new)}
    monkeypatch.setattr(kernels, "source", broken.__getitem__)
    forget_kernels()
    for order in reversed(build.ORDERS):
        build.settings.order = order
        try:
            check(ops, mistake.caught_by)
        except (AssertionError, build.KernelError):
            break
    else:
        pytest.fail("no order of the threads showed the mistake")
