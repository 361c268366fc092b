"""Every operation of the GPU backend against the reference, on the inputs all backends are tested with."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from net import reference
from net.gpu.arrays import cast
from tests.gpu.conftest import REAL
from tests.gpu.standin import round_to_bf16
from tests.net import cases

SMALL = [case for case in cases.ALL if not case.layer]
# Nobody needs the gradient of the picture, and it is conv1's most expensive part.
LAYERS = [c for c in cases.ALL if c.layer and (c.operation, c.name) != ("conv2d_backward", "conv1")]
PRODUCTS = [case for case in SMALL if case.operation.startswith(("conv", "linear")) and not case.nan]
# Operations on pictures, which are stored as bfloat16 between layers.
PICTURES = ("relu", "lrn", "map_norm", "maxpool", "dropout")


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_agrees_with_the_reference(fp32: ModuleType, order: str, case: cases.Case) -> None:
    cases.check(fp32, case, 1e-5)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layers_of_alexnet_agree_with_the_reference(fp32: ModuleType, case: cases.Case) -> None:
    cases.check(fp32, case, 1e-5)


# Rounded operands: a product of two is off by two roundings, and the sum of many by about as much, relatively. Tensor
# cores may cut TF32's operands off where the stand-in rounds them: twice the error, and all of it towards zero.
@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 2.0**-8 if REAL else 2.0**-10), ("bf16", 2.0**-6)])
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products_in_lower_precision(
    backend: Callable[[str], ModuleType], precision: str, tolerance: float, case: cases.Case
) -> None:
    ops = backend(precision)
    cases.check(ops, case, tolerance)
    if case.name == "odd, 3x3":
        with pytest.raises(AssertionError):  # the precision asked for is the one used
            cases.check(ops, case, 1e-6)


@pytest.mark.parametrize(
    "case", [c for c in SMALL if c.operation.startswith(PICTURES) and not c.strided and not c.nan], ids=str
)
def test_pictures_stored_as_bfloat16(backend: Callable[[str], ModuleType], case: cases.Case) -> None:
    """The result is the reference's on the rounded inputs, rounded once."""
    ops = backend("bf16")

    keep_s = 2 if case.operation in ("lrn_backward", "map_norm_backward") else None
    host = [round_to_bf16(a) if a.dtype == np.float32 and i != keep_s else a for i, a in enumerate(case.args)]
    device = [
        cast(ops.asarray(a), "uint16") if a.dtype == np.float32 and i != keep_s else ops.asarray(a)
        for i, a in enumerate(host)
    ]
    kwargs = {name: cases._on(ops, value, np.float32) for name, value in case.kwargs.items()}
    with np.errstate(invalid="ignore", over="ignore"):
        expected = getattr(reference, case.operation)(*host, **case.kwargs)
    got = getattr(ops, case.operation)(*device, **kwargs)
    if not isinstance(expected, tuple):
        expected, got = (expected,), (got,)
    assert got[0].dtype == np.uint16
    exact = case.operation in cases.EXACT
    for number, (g, e) in enumerate(zip(got, expected, strict=True)):
        if e.dtype == np.uint8:
            np.testing.assert_array_equal(ops.to_host(g), e)
        elif exact:
            np.testing.assert_array_equal(ops.to_host(g), round_to_bf16(e))
        else:
            cases.assert_close(ops.to_host(g), e, 2.0**-8 if number == 0 else 1e-5)


@pytest.mark.parametrize("case", [c for c in SMALL if c.operation == "augment"], ids=str)
def test_augmentation_in_bfloat16(backend: Callable[[str], ModuleType], case: cases.Case) -> None:
    cases.check(backend("bf16"), case, 2.0**-8)


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(backend: Callable[[str], ModuleType]) -> None:
    ops = backend("bf16")
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF, 0x80000000])
    x = bits.astype(np.uint32).view(np.float32)
    got = ops.to_host(cast(ops.asarray(x), "uint16"))
    np.testing.assert_array_equal(got, round_to_bf16(x))
    assert np.isnan(got[5:7]).all()
    assert got[0] == 1.0  # halfway, to even
    assert got[1] == 1.015625  # halfway, to even, upwards
    assert ops.to_host(cast(cast(ops.asarray(x), "uint16"), "float32"))[2] == got[2]


def test_what_a_kernel_cannot_take_is_refused(fp32: ModuleType) -> None:
    x = fp32.asarray(np.zeros((1, 1, 4, 4), np.int32))
    with pytest.raises(TypeError, match="float32"):
        fp32.conv2d_forward(x, x, x, stride=1, pad=0, groups=1)
    picture = fp32.asarray(np.zeros((1, 4, 4, 6), np.float32))
    weights = fp32.asarray(np.zeros((3, 3, 6, 4), np.float32))
    with pytest.raises(ValueError, match="do not fit"):
        fp32.conv2d_forward(picture, weights, weights, stride=1, pad=0, groups=2)
    with pytest.raises(TypeError, match="uint16"):
        fp32.asarray(np.zeros(3, np.uint16))
