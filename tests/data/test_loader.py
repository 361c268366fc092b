"""The loader: batches in order, exact crops, errors where they belong, no thread and no memory left over."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from data import loader
from data.sampling import Augmentation, Crops, steps_per_epoch, training_crops
from tests.command_line import ROOT

SIZE, CROP, COUNT, BATCH = 20, 13, 37, 8
HOW = Augmentation(size=SIZE, crop=CROP, random_crop=True, flip=True, jitter=0.1, directions=np.eye(3) * 30)


class Pictures:
    """Random pictures, each different from all others."""

    def __init__(self) -> None:
        random = np.random.default_rng(5)
        self.images = random.integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
        self.labels = random.permutation(COUNT).astype(np.int32)

    def row(self, index: int) -> np.ndarray:
        return self.images[index]


def plan(number: int) -> Crops:
    epoch, place = divmod(number, steps_per_epoch(COUNT, BATCH))
    order = np.random.default_rng(epoch).permutation(COUNT)
    return training_crops(order, place * BATCH, min((place + 1) * BATCH, COUNT), 0, epoch, HOW)


def load(batches: range, plan=plan, pictures=None, slots: int = 3, threads: int = 2, **options):
    return loader.load(
        pictures or Pictures(), plan, batches, crop=CROP, largest=BATCH, slots=slots, threads=threads, **options
    )


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize(("slots", "threads"), [(2, 1), (3, 2), (2, 8), (16, 3)])
def test_batches_come_in_order_with_exact_crops(slots: int, threads: int) -> None:
    pictures = Pictures()
    numbers = []
    for batch in load(range(3, 14), pictures=pictures, slots=slots, threads=threads):
        numbers.append(batch.number)
        crops = plan(batch.number)
        arrays = batch.arrays
        assert len(crops.index) == len(arrays["images"]) == (5 if batch.number % 5 == 4 else 8)
        for i, index in enumerate(crops.index.tolist()):
            top, left = crops.corner[i]
            assert np.array_equal(arrays["images"][i], pictures.images[index][top : top + CROP, left : left + CROP])
            assert arrays["labels"][i] == pictures.labels[index]
        for name in ("corner", "flip", "shift"):
            assert arrays[name].tobytes() == getattr(crops, name).tobytes()
        kinds = {name: array.dtype.str for name, array in arrays.items()}
        assert kinds == {"images": "|u1", "corner": "<i4", "flip": "|u1", "shift": "<f4", "labels": "<i4"}
        assert all(array.flags.c_contiguous for array in arrays.values())
        assert batch.waited >= 0
    assert numbers == list(range(3, 14))


def test_a_batch_says_how_long_it_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], threading.Event()

    def clock() -> float:
        value = now[0]
        asked.set()
        return value

    def late(number: int) -> Crops:
        asked.wait()
        now[0] += 5
        return plan(number)

    monkeypatch.setattr(loader, "time", SimpleNamespace(perf_counter=clock))
    assert [batch.waited for batch in load(range(1), plan=late)] == [5]


def test_every_picture_comes_once_an_epoch() -> None:
    labels = np.concatenate([b.arrays["labels"].copy() for b in load(range(5, 10))])
    assert np.array_equal(np.sort(labels), np.arange(COUNT))


def test_no_batches_end_at_once() -> None:
    assert list(load(range(4, 4))) == []


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_is_raised_at_its_batch(threads: int) -> None:
    def failing(number: int) -> Crops:
        if number == 4:
            raise RuntimeError("broken plan")
        return plan(number)

    seen = []
    batches = load(range(9), plan=failing, threads=threads, slots=6)

    def drain() -> None:
        seen.extend(batch.number for batch in batches)

    with pytest.raises(RuntimeError, match="broken plan"):
        drain()
    assert seen == [0, 1, 2, 3]


def test_an_error_of_the_pictures_is_raised_too() -> None:
    class Broken(Pictures):
        def row(self, index: int) -> np.ndarray:
            raise OSError("unreadable shard")

    with pytest.raises(OSError, match="unreadable shard"):
        next(load(range(3), pictures=Broken()))


def test_a_crop_beyond_the_picture_is_an_error_not_a_wrong_picture() -> None:
    def outside(number: int) -> Crops:
        crops = plan(number)
        return Crops(crops.index, crops.corner + SIZE - CROP + 1, crops.flip, crops.shift)

    with pytest.raises(ValueError, match="beyond its picture"):
        next(load(range(3), plan=outside))


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_closing_early_ends_the_threads(taken: int) -> None:
    with contextlib.closing(load(range(1000), threads=4)) as batches:
        for _ in range(taken):
            next(batches)
        if taken:
            assert sum(thread.name.startswith("loader-") for thread in threading.enumerate()) == 4


def test_an_error_of_the_consumer_ends_the_threads() -> None:
    def consume() -> None:
        with contextlib.closing(load(range(1000), threads=4)) as batches:
            for batch in batches:
                if batch.number == 2:
                    raise KeyError("consumer")

    with pytest.raises(KeyError, match="consumer"):
        consume()


def test_a_slot_stays_untouched_until_the_next_batch_is_asked_for() -> None:
    for batch in load(range(40), slots=2, threads=4):
        before = {name: array.copy() for name, array in batch.arrays.items()}
        time.sleep(0.002)
        for name, array in batch.arrays.items():
            assert np.array_equal(array, before[name])


def test_buffers_come_from_the_allocator_and_number_the_slots() -> None:
    made = []

    def allocate(shape: tuple[int, ...], dtype: type) -> np.ndarray:
        made.append((shape, np.dtype(dtype).str))
        return np.empty(shape, dtype)

    for _ in load(range(30), slots=3, allocate=allocate):
        pass
    slot = [((8 * 13 * 13 * 3 + 64,), "|u1"), ((8, 2), "<i4"), ((8,), "|u1"), ((8, 3), "<f4"), ((8,), "<i4")]
    assert made == slot * 3


def test_workers_read_ahead_by_the_ring_and_no_further() -> None:
    planned = []

    def noted(number: int) -> Crops:
        planned.append(number)
        return plan(number)

    with contextlib.closing(load(range(100), plan=noted, slots=4, threads=2)) as batches:
        next(batches)
        time.sleep(0.1)
        assert sorted(planned) == [0, 1, 2, 3]
        next(batches)
        time.sleep(0.1)
        assert sorted(planned) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("slots", [2, 3, 16])
def test_no_deadlock_with_many_threads_and_a_slow_plan(slots: int) -> None:
    random = np.random.default_rng(0)
    delays = random.choice([0, 0, 0.001, 0.005], 200)

    def slow(number: int) -> Crops:
        time.sleep(delays[number])
        return plan(number)

    numbers: list[int] = []

    def consume() -> None:
        numbers.extend(batch.number for batch in load(range(200), plan=slow, slots=slots, threads=24))

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    consumer.join(timeout=60)
    assert not consumer.is_alive(), f"stuck after batch {numbers[-1:]}"
    assert numbers == list(range(200))


def memory_peaks() -> list[int]:
    """The most bytes allocated at a time in the first hundred epochs, and in the other nine hundred."""
    pictures = Pictures()
    crops = [plan(number) for number in range(5)]
    peaks = []
    list(load(range(5), plan=crops.__getitem__, pictures=pictures, slots=4))  # loads what has been compiled
    tracemalloc.start()
    for batch in load(range(5000), plan=lambda number: crops[number % 5], pictures=pictures, slots=4):
        if batch.number in (499, 4999):
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()
    return peaks


def test_memory_stays_flat_over_a_thousand_epochs() -> None:
    # In a process of its own: what other tests have left running allocates too.
    code = "from tests.data.test_loader import memory_peaks; print(*memory_peaks())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    early, late = map(int, done.stdout.split())
    ring = 4 * (BATCH * (CROP * CROP * 3 + 8 + 1 + 12 + 4))
    assert late <= early + 20_000, (early, late, ring)
    assert late < ring + 60_000


@pytest.mark.parametrize("start", [0, 1, 32])  # of the batch, in bytes after a cache line
@pytest.mark.parametrize("crop", [1, 13, 32, 33, 64])  # rows of 32 and 64 pixels fill whole streamed pieces
def test_crops_are_copied_exactly_and_nothing_beside_them_is_touched(crop: int, start: int) -> None:
    random, size, count = np.random.default_rng(crop), 70, 5
    rows = list(random.integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    corner = random.integers(0, size - crop + 1, (count, 2)).astype(np.int32)
    corner[:2] = [[0, 0], [size - crop, size - crop]]
    length = count * crop * crop * 3
    space = np.full(length + 256, 7, dtype=np.uint8)
    first = -space.ctypes.data % 64 + 64 + start
    images = space[first : first + length].reshape(count, crop, crop, 3)
    loader._copy_crops(rows, corner, images)
    for image, row, (top, left) in zip(images, rows, corner, strict=True):
        assert np.array_equal(image, row[top : top + crop, left : left + crop])
    assert (space[:first] == 7).all()
    assert (space[first + length :] == 7).all()


@pytest.mark.parametrize("corner", [[[-1, 0]], [[0, -1]], [[0, 8]], [[8, 0]], [[0, 0], [0, 0]]])
def test_a_place_outside_is_refused(corner: list[list[int]]) -> None:
    row, images = np.zeros((20, 20, 3), dtype=np.uint8), np.empty((1, 13, 13, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="beyond its picture"):
        loader._copy_crops([row], np.array(corner, dtype=np.int32), images)


def test_pictures_that_are_not_laid_out_alike_are_refused() -> None:
    sound, corner = np.zeros((20, 20, 3), dtype=np.uint8), np.zeros((2, 2), dtype=np.int32)
    images = np.empty((2, 13, 13, 3), dtype=np.uint8)
    wrong = (
        *(sound[:, ::-1], sound.transpose(1, 0, 2), sound[:19], np.zeros((20, 20, 4), dtype=np.uint8)),
        *(np.zeros((21, 21, 3), dtype=np.uint8), sound.astype(np.int8)),
    )
    for row in wrong:
        with pytest.raises(ValueError, match="contiguous"):
            loader._copy_crops([sound, row], corner, images)
