"""Weights as safetensors files: a JSON header with names, shapes and text, then the raw numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from net.layers import Shape
from net.weights.errors import WeightsError
from net.weights.layout import check_shapes

# What a damaged file makes it raise.
_ERRORS: Final = (SafetensorError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Header:
    """What a file says it holds; nothing of it has been checked."""

    metadata: dict[str, str]
    shapes: dict[str, Shape]
    dtypes: dict[str, str]


def to_bytes(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A complete safetensors file."""
    return save(arrays, metadata)


def read_header(path: Path) -> Header:
    """Names, shapes and text of a file, without its numbers.

    Raises
    ------
    WeightsError
        It is no safetensors file, or cut short.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no dict: it has no __iter__
            shapes = {name: tuple(view.get_shape()) for name, view in views.items()}
            dtypes = {name: view.get_dtype() for name, view in views.items()}
            return Header(file.metadata() or {}, shapes, dtypes)
    except _ERRORS as error:
        raise WeightsError(f"it is damaged or no safetensors file ({error})") from error


def read_arrays(path: Path, expected: dict[str, Shape]) -> dict[str, np.ndarray]:
    """The arrays named in ``expected``, float32, after their shapes have been compared with it.

    Raises
    ------
    WeightsError
        Another name, shape or dtype than expected; nothing has been read then. Or a number that is not finite.
    """
    header = read_header(path)
    check_shapes(header.shapes, expected)
    for name, dtype in header.dtypes.items():
        if dtype not in ("F32", "F16", "F64"):
            raise WeightsError(f"its {name} is of type {dtype}; F32, F16 and F64 can be read")
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name).astype(np.float32, copy=False) for name in expected}
    except _ERRORS as error:
        raise WeightsError(f"it is damaged ({error})") from error
    check_finite(arrays)
    return arrays


def check_finite(arrays: dict[str, np.ndarray]) -> None:
    """Raise ``WeightsError``, with the array's name, where one holds NaN or infinity."""
    for name, array in arrays.items():
        if not np.all(np.isfinite(array)):
            raise WeightsError(f"its {name} holds numbers that are not finite")
