"""Arrays that do not fit each other are refused before a kernel is launched."""

from __future__ import annotations

from types import ModuleType

from tests.net import misfits


def test_the_gpu_refuses_arrays_that_do_not_fit(fp32: ModuleType) -> None:
    assert misfits.taken(fp32) == []
