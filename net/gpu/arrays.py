"""Arrays on the GPU: getting them there and back, and their types.

Pictures between layers (4 axes) are stored as float32, or under ``--precision bf16`` as bfloat16 in arrays of dtype
uint16 that hold the bits: no other dtype of that width is used anywhere, so uint16 always means bfloat16. Vectors
(2 axes, the fully connected layers), weights, gradients and statistics are float32 in every precision.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Any, Final

import numpy as np

from net.gpu.device import current, event_on
from net.gpu.kernels import THREADS, launch
from net.layers import Array

BFLOAT16: Final = "uint16"


def asarray(a: Any) -> Array:
    """A device array with the values of a host array; a device array is returned as it is. float64 becomes float32."""
    if isinstance(a, current().cupy.ndarray):
        return a
    host = np.ascontiguousarray(a, dtype=np.float32 if np.asarray(a).dtype == np.float64 else None)
    if host.dtype == np.uint16:
        raise TypeError("uint16 arrays stand for bfloat16 on the GPU; convert to int32 or float32 first")
    device = empty(host.shape, host.dtype)
    if host.size:
        device.set(host)
        synchronize()  # the host array may be changed as soon as this returns
    return device


def to_host(a: Array) -> np.ndarray:
    """A NumPy array with the values of a device array; bfloat16 becomes float32.

    Waits for everything queued so far, but for the result of a recorded step only for that step.
    """
    if isinstance(a, np.ndarray):
        host = a
    elif (event := _finished(a)) is not None:
        _copying().wait_event(event)
        host = a.get(stream=_copying())
    else:
        # Of an array with gaps CuPy makes a copy `with stream:`, and is on its default stream afterwards.
        host = dense(a).get(stream=current().stream)
    return (host.astype(np.uint32) << 16).view(np.float32) if host.dtype == np.uint16 else host


_results: deque[tuple[Any, Any]] = deque(maxlen=8)


def mark_finished(a: Array) -> None:
    """Note that ``a`` is complete when what is queued now has been done, so that reading it waits for no more."""
    _results.append((weakref.ref(a), event_on(current().stream)))


def _finished(a: Array) -> Any:
    return next((event for reference, event in _results if reference() is a), None)


def empty(shape: Any, dtype: Any) -> Array:
    """A device array with whatever values its memory holds."""
    return current().cupy.empty(shape, dtype)


def host_empty(shape: Any, dtype: Any) -> np.ndarray:
    """A NumPy array in pinned memory, from which copies run beside computations.

    Raises
    ------
    MemoryError
        The host has no such memory left, which CUDA tells by an error of its own.
    """
    import cupyx

    try:
        return cupyx.empty_pinned(shape, dtype)
    except current().cupy.cuda.runtime.CUDARuntimeError as error:
        size = prod(shape) * np.dtype(dtype).itemsize
        raise MemoryError(f"of the host's, no {size:,} bytes can be pinned for the GPU to read: {error}") from error


def synchronize() -> None:
    """Wait until everything queued has been done."""
    current().stream.synchronize()


def cast(x: Array, dtype: Any) -> Array:
    """``x`` as float32 or bfloat16 (uint16), itself where it is that already."""
    wanted = np.dtype(dtype)
    if x.dtype == wanted:
        return x
    if {x.dtype.name, wanted.name} != {"float32", BFLOAT16}:
        raise TypeError(f"the GPU backend computes with float32 and bfloat16 arrays, not with {x.dtype}")
    y = empty(x.shape, wanted)
    if wanted == np.float32:
        launch("cast_to_float", blocks(x.size), (x, y, x.size), dtype=BFLOAT16)
    else:
        launch("cast_from_float", blocks(x.size, 4), (x, y, x.size, x.size), dtype=BFLOAT16)
    return y


def dense(x: Array) -> Array:
    """``x`` without gaps in memory and from a 16-byte boundary on, as the kernels want it; a copy only where needed."""
    if x.flags.c_contiguous and x.data.ptr % 16 == 0:
        return x
    y = empty(x.shape, x.dtype)
    y[...] = x
    return y


def floats(x: Array) -> Array:
    """``x`` dense and as float32."""
    return cast(dense(x), np.float32)


def pictures(x: Array) -> Array:
    """``x`` dense and in the type in which pictures are stored and matrices multiplied."""
    return cast(dense(x), current().storage)


def blocks(elements: int, each: int = 1) -> tuple[int]:
    """The grid in which a thread takes ``each`` elements."""
    return (-(-elements // (THREADS * each)),)


@cache
def _copying() -> Any:
    """The stream that copies batches to the device."""
    return current().cupy.cuda.Stream(non_blocking=True)


_SLOTS: Final = 3
_slots: dict[tuple[Any, ...], list[dict[str, Array]]] = {}
_uploads = 0
_queued: list[Any] = []  # an event a recent upload: what had been queued when it was called


def upload(arrays: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """Copy a batch to the device on a stream of its own, while the steps queued before run.

    When it returns the host arrays may be overwritten. The device arrays are three sets used in turn: those returned
    may be used by whatever is queued before the second following call. Work queued after this call sees the copied
    values.
    """
    global _uploads
    stream, copying = current().stream, _copying()
    key = tuple((name, a.shape, a.dtype.str) for name, a in arrays.items())
    if key not in _slots:
        # Another shape: the old slots may still be read by queued work, so wait before their memory is given back.
        synchronize()
        _slots.clear()
        _slots[key] = [{name: empty(a.shape, a.dtype) for name, a in arrays.items()} for _ in range(_SLOTS)]
        synchronize()
    slot = _slots[key][_uploads % _SLOTS]
    _uploads += 1
    _queued.append(event_on(stream))
    # The slot was last handed out three calls ago and may be in use by what was queued until the previous call.
    copying.wait_event(_queued[0] if len(_queued) == 1 else _queued.pop(0))
    for name, a in arrays.items():
        if prod(a.shape):
            slot[name].set(np.ascontiguousarray(a), stream=copying)
    copied = event_on(copying)
    stream.wait_event(copied)
    copied.synchronize()
    return dict(slot)
