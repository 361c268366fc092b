"""Moving arrays between host and device.

The reference computes on the host, so nothing would have to be moved. It copies all the same, because a GPU works on a
copy too: a program that writes into an array it has handed over then behaves alike on every backend.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike


def asarray(a: ArrayLike) -> np.ndarray:
    """A contiguous device copy of a host array, of the same dtype."""
    return np.array(a, order="C")


def to_host(a: np.ndarray) -> np.ndarray:
    """A contiguous NumPy copy of a device array."""
    return np.array(a, order="C")


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """A device array whose values are not set."""
    return np.empty(shape, dtype)


def host_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """A NumPy array whose values are not set, for the loader to fill and :func:`upload` to send."""
    return np.empty(shape, dtype)


def upload(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Device copies under the same names; the host arrays may be overwritten when this returns."""
    return {name: asarray(a) for name, a in arrays.items()}


def synchronize() -> None:
    """Wait for the device. Every function here has done its work when it returns, so there is nothing to wait for."""
