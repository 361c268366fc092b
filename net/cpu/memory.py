"""Arrays over memory that is used again.

A training step makes the same arrays each time, hundreds of megabytes of them. Asking the operating system for fresh
memory costs a page fault every 4 KiB, which at these sizes is as much time as the arithmetic of a layer. So blocks are
kept: :func:`empty` hands out a NumPy array over a block of the right size, and when the last reference to that array
and to all of its views is gone, the block goes back to the pool. From the second step on nothing new is allocated.

Sizes are rounded up to whole cache lines, large ones to whole huge pages, and a block is only ever reused for its own
rounded size. What the first step needed therefore suffices for every later one.

Gain (batch 128): see docs/cpu.md.
"""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

_LINE: Final = 64  # bytes of a cache line, and of the widest vector register
_HUGE: Final = 2 << 20  # bytes of a huge page
_MAPPED: Final = 1 << 20  # blocks from this size on get a memory mapping of their own

_free: defaultdict[int, list[np.ndarray]] = defaultdict(list)
_total = 0


def empty(shape: tuple[int, ...] | int, dtype: DTypeLike = np.float32) -> np.ndarray:
    """A C-contiguous array from the pool, aligned to 64 bytes, whose values are not set."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    size = _rounded(count * dtype.itemsize)
    free = _free[size]
    block = free.pop() if free else _allocate(size)
    # Views refer to the first array whose own base is not an array; a memoryview makes that `owner`, whatever the user
    # slices from it. When `owner` goes, nobody looks at the block any more.
    owner = np.frombuffer(memoryview(block), dtype=np.uint8)
    weakref.finalize(owner, free.append, block).atexit = False
    return owner[: count * dtype.itemsize].view(dtype).reshape(shape)


def pool_bytes() -> int:
    """Bytes the pool has ever asked the system for; it gives nothing back before the process ends or :func:`trim`."""
    return _total


def trim() -> None:
    """Give the blocks that nobody uses back to the system."""
    global _total
    for size, blocks in _free.items():
        _total -= size * len(blocks)
        blocks.clear()


def poison(value: np.float32) -> None:
    """Fill all memory that nobody uses with a value: tests show with it that nothing is read before it is written."""
    for blocks in _free.values():
        for block in blocks:
            block.view(np.float32)[:] = value


def asarray(a: ArrayLike) -> np.ndarray:
    """A contiguous copy of a host array, of the same dtype."""
    a = np.asarray(a)
    copy = empty(a.shape, a.dtype)
    np.copyto(copy, a)
    return copy


def to_host(a: np.ndarray) -> np.ndarray:
    """A contiguous NumPy copy, in ordinary memory: what is kept for long does not belong to the pool."""
    return np.array(a, order="C")


def host_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """A buffer for the loader to fill."""
    return np.empty(shape, dtype)


def upload(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies under the same names; the host arrays may be overwritten when this returns."""
    return {name: asarray(a) for name, a in arrays.items()}


def synchronize() -> None:
    """Every operation has done its work when it returns, so there is nothing to wait for."""


def contiguous(a: np.ndarray, dtype: DTypeLike = np.float32) -> np.ndarray:
    """``a`` itself where a kernel can take it: C order, this dtype, writeable; else a copy.

    Kernels are compiled for one memory layout; for another, Numba would compile them anew without a word.
    """
    if a.dtype == dtype and a.flags.carray:
        return a
    copy = empty(a.shape, dtype)
    np.copyto(copy, a)
    return copy


def _rounded(size: int) -> int:
    unit = _HUGE if size >= _MAPPED else _LINE
    return max(-(-size // unit), 1) * unit


def _allocate(size: int) -> np.ndarray:
    """A block of ``size`` bytes on a 64-byte boundary; large ones on a huge page's."""
    global _total
    _total += size
    if size < _MAPPED:
        raw = np.empty(size + _LINE, dtype=np.uint8)
        unit = _LINE
    else:
        pages = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(pages, dtype=np.uint8)
        unit = _HUGE
    start = -raw.ctypes.data % unit
    return raw[start : start + size]
