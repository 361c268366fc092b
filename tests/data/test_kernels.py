"""How the data path's loops are compiled; what they compute is tested with the pictures (``test_images.py``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from data import kernels


def test_where_no_cache_can_be_written_they_are_compiled_without(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def njit(*, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function 'f': no locator available for file")
        return lambda function: function

    monkeypatch.setattr(kernels.numba, "njit", njit)
    assert kernels._compiled(len) is len
    assert asked == [True, False]


def test_what_works_with_bare_addresses_refuses_another_layout() -> None:
    pixels = np.zeros((4, 8), np.uint32)
    with pytest.raises(ValueError, match="turned: wrong layout"):
        kernels.turned(pixels, np.zeros((4, 8), np.uint32))
    with pytest.raises(ValueError, match="without_fourth: wrong layout"):
        kernels.without_fourth(np.zeros((4, 8, 3), np.uint8))
