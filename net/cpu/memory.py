"""Arrays over memory that is used again.

A training step makes the same arrays each time, hundreds of megabytes of them. Asking the operating system for fresh
memory costs a page fault every 4 KiB, which at these sizes is as much time as the arithmetic of a layer. So memory is
kept: :func:`empty` hands out a NumPy array over a piece of a large mapping, and when the last reference to that array
and to all of its views is gone, the piece is free again. From the second step on nothing new is touched.

An array gets the lowest free piece that it fits into, and free neighbours become one. An array of one layer can
therefore lie where several smaller ones of another did, and the pool grows to what exists at one time and hardly more.
That counts at the start: the first step waits for every byte it is the first to touch.

Gain (batch 128): peak memory 2022 to 1653 MiB (docs/cpu.md, "Memory").
"""

from __future__ import annotations

import mmap
import weakref
from bisect import bisect
from collections import deque
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

_LINE: Final = 64  # bytes of a cache line, and of the widest vector register
_HUGE: Final = 2 << 20  # bytes of a huge page
_REGION: Final = 1 << 30  # bytes of address space taken at a time; none of it is memory before it is written to


class _Region:
    """One mapping: its bytes, the pieces of them that are free, and how many have ever been handed out."""

    def __init__(self, size: int) -> None:
        pages = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(pages, dtype=np.uint8)
        start = -raw.ctypes.data % _HUGE
        self.bytes = raw[start : start + size]
        self.free = [(0, size)]  # begin and end of each piece, in order; no two touch
        self.used = 0

    def take(self, size: int) -> int | None:
        """Take the lowest free piece of ``size`` bytes: where it begins, or None where there is none."""
        for number, (begin, end) in enumerate(self.free):
            if end - begin >= size:
                self.free[number : number + 1] = [(begin + size, end)] if end - begin > size else []
                self.used = max(self.used, begin + size)
                return begin
        return None

    def give_back(self, begin: int, end: int) -> None:
        at = first = bisect(self.free, (begin, end))
        if first > 0 and self.free[first - 1][1] == begin:
            first -= 1
            begin = self.free[first][0]
        if at < len(self.free) and self.free[at][0] == end:
            end = self.free[at][1]
            at += 1
        self.free[first:at] = [(begin, end)]


_regions: list[_Region] = []
# Arrays may end in any thread, and within any statement; what they leave is sorted in when one is asked for next.
_left: deque[tuple[_Region, int, int]] = deque()


def empty(shape: tuple[int, ...] | int, dtype: DTypeLike = np.float32) -> np.ndarray:
    """A C-contiguous array from the pool, aligned to 64 bytes, whose values are not set."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    size = max(-(-count * dtype.itemsize // _LINE), 1) * _LINE
    region, begin = _take(size)
    # Views refer to the first array whose own base is not an array; a memoryview makes that `owner`, whatever the user
    # slices from it. When `owner` goes, nobody looks at the piece any more.
    owner = np.frombuffer(memoryview(region.bytes[begin : begin + size]), dtype=np.uint8)
    weakref.finalize(owner, _left.append, (region, begin, begin + size)).atexit = False
    return owner[: count * dtype.itemsize].view(dtype).reshape(shape)


def pool_bytes() -> int:
    """Bytes of memory the pool has ever handed out and not given back to the system, which it never does."""
    return sum(region.used for region in _regions)


def poison(value: np.float32) -> None:
    """Fill all memory that nobody uses with a value: tests show with it that nothing is read before it is written."""
    _sort_in()
    for region in _regions:
        for begin, end in region.free:
            region.bytes[begin : min(end, region.used)].view(np.float32)[:] = value


def asarray(a: ArrayLike) -> np.ndarray:
    """A contiguous copy of a host array, of the same dtype."""
    a = np.asarray(a)
    copy = empty(a.shape, a.dtype)
    np.copyto(copy, a)
    return copy


def adopt(a: np.ndarray) -> np.ndarray:
    """``a`` itself where it is as :func:`empty` would have made it, contiguous from a cache line on; else a copy."""
    return a if a.flags.carray and a.ctypes.data % _LINE == 0 else asarray(a)


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


def _take(size: int) -> tuple[_Region, int]:
    """A region and where in it ``size`` bytes begin that are not free any more."""
    _sort_in()
    for region in _regions:
        begin = region.take(size)
        if begin is not None:
            return region, begin
    region = _Region(max(_REGION, -(-size // _HUGE) * _HUGE))
    _regions.append(region)
    region.take(size)
    return region, 0


def _sort_in() -> None:
    while _left:
        region, begin, end = _left.popleft()
        region.give_back(begin, end)
