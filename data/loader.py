"""The prefetching worker: threads fill a ring of reused buffers with uint8 crops while the network computes.

The ring has a fixed number of slots, allocated once. A worker takes the next batch number and a free slot, asks the
``plan`` which crops make that batch, and copies them out of the memory-mapped shards. The consumer takes batches in
order, whatever order the workers finish in, and gives each slot back when it is done with it. There is no fork and no
shared-memory segment: one call copies all crops of a batch without Python's global lock, so threads suffice.

An error in a worker is raised in the consumer, at the batch it belongs to.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from data.sampling import Crops

Plan = Callable[[int], Crops]  # batch number -> its crops

_LINE: Final = 64  # bytes of a cache line; crops are copied fastest into a buffer that begins with one


class Pictures(Protocol):
    """What is needed of a split to use its pictures: their number and labels, and one stored picture at a time.

    Pictures are uint8 (size, size, 3), contiguous, all of one size.
    """

    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Batch:
    """One filled slot of the ring.

    ``arrays`` has ``images`` uint8 (N, crop, crop, 3) as stored (not yet mirrored), ``corner`` int32 (N, 2),
    ``flip`` uint8 (N,), ``shift`` float32 (N, 3) and ``labels`` int32 (N,). They are views of the ring's buffers:
    valid until the next batch is asked for. ``waited`` is the time in seconds the consumer had to wait.
    """

    number: int
    arrays: dict[str, np.ndarray]
    waited: float


def load(
    pictures: Pictures,
    plan: Plan,
    batches: range,
    *,
    crop: int,
    largest: int,
    slots: int,
    threads: int,
    allocate: Callable[[tuple[int, ...], type], np.ndarray] = np.empty,
) -> Generator[Batch, None, None]:
    """Yield the batches numbered ``batches``, in order, reading ahead by up to ``slots`` batches.

    Parameters
    ----------
    crop : int
        Side of the crops in pixels.
    largest : int
        Crops in the largest batch.
    allocate : callable
        Makes a buffer from (shape, dtype); a GPU backend gives pinned memory.

    The workers end with the generator, also when it is closed early (``contextlib.closing``) or left by an error.
    """
    ring = [_slot(largest, crop, allocate) for _ in range(slots)]
    state = _Ring(deque(range(slots)), batches)
    workers = [
        threading.Thread(target=_work, args=(state, ring, pictures, plan), name=f"loader-{i}", daemon=True)
        for i in range(threads)
    ]
    for worker in workers:
        worker.start()
    try:
        for number in batches:
            start = time.perf_counter()
            slot, count, error = state.take(number)
            if error is not None:
                raise error
            arrays = {name: buffer[:count] for name, buffer in ring[slot].items()}
            yield Batch(number, arrays, time.perf_counter() - start)
            state.give_back(slot)
    finally:
        state.close()
        for worker in workers:
            worker.join()


def _slot(largest: int, crop: int, allocate: Callable[[tuple[int, ...], type], np.ndarray]) -> dict[str, np.ndarray]:
    count = largest * crop * crop * 3
    spare = allocate((count + _LINE,), np.uint8)
    images = spare[-spare.ctypes.data % _LINE :][:count].reshape(largest, crop, crop, 3)
    return {
        "images": images,
        "corner": allocate((largest, 2), np.int32),
        "flip": allocate((largest,), np.uint8),
        "shift": allocate((largest, 3), np.float32),
        "labels": allocate((largest,), np.int32),
    }


class _Ring:
    """Which slots are free, which batches are still to be filled, which are ready. All under one condition."""

    def __init__(self, free: deque[int], todo: range) -> None:
        self._free, self._todo = free, todo
        self._ready: dict[int, tuple[int, int, BaseException | None]] = {}
        self._changed = threading.Condition()
        self._closed = False

    def next_job(self) -> tuple[int, int] | None:
        """A batch number and a free slot for a worker, None when there is nothing left to do."""
        with self._changed:
            # A batch number is taken together with its slot, in order, so that the batch the consumer waits for
            # always has one: no deadlock however the workers are scheduled.
            self._changed.wait_for(lambda: self._closed or not self._todo or self._free)
            if self._closed or not self._todo:
                return None
            number, self._todo = self._todo[0], self._todo[1:]
            return number, self._free.popleft()

    def put(self, number: int, slot: int, count: int, error: BaseException | None) -> None:
        with self._changed:
            self._ready[number] = slot, count, error
            self._changed.notify_all()

    def take(self, number: int) -> tuple[int, int, BaseException | None]:
        with self._changed:
            self._changed.wait_for(lambda: number in self._ready)
            return self._ready.pop(number)

    def give_back(self, slot: int) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _work(state: _Ring, ring: list[dict[str, np.ndarray]], pictures: Pictures, plan: Plan) -> None:
    while (job := state.next_job()) is not None:
        number, slot = job
        try:
            count = _fill(ring[slot], pictures, plan(number))
        except BaseException as error:  # noqa: BLE001  whatever it is, the consumer must see it and not wait for ever
            state.put(number, slot, 0, error)
            return
        state.put(number, slot, count, None)


def _fill(slot: dict[str, np.ndarray], pictures: Pictures, crops: Crops) -> int:
    count = len(crops.index)
    slot["corner"][:count] = crops.corner
    slot["flip"][:count] = crops.flip
    slot["shift"][:count] = crops.shift
    slot["labels"][:count] = pictures.labels[crops.index]
    _copy_crops([pictures.row(index) for index in crops.index.tolist()], crops.corner, slot["images"][:count])
    return count


def _copy_crops(rows: list[np.ndarray], corner: np.ndarray, images: np.ndarray) -> None:
    """Fill ``images`` with the crops of ``rows``. What follows works with bare addresses, so all is checked here.

    Raises
    ------
    ValueError
        A crop reaches beyond its picture, or the pictures are not laid out as they should be.
    """
    size, crop = rows[0].shape[0], images.shape[1]
    layout = (np.dtype(np.uint8), (size, size, 3), (size * 3, 3, 1))
    if any((row.dtype, row.shape, row.strides) != layout for row in rows):
        raise ValueError(f"the pictures are not all uint8 ({size}, {size}, 3) and contiguous")
    if corner.shape != (len(rows), 2) or corner.min() < 0 or corner.max() > size - crop:
        raise ValueError(f"a crop of {crop} pixels reaches beyond its picture of {size}")
    from data import kernels  # and Numba with it, which a start should not wait for before it has begun to draw weights

    address = np.array([row.__array_interface__["data"][0] for row in rows], dtype=np.uint64)
    kernels.copy_crops(address, corner, size, images)
