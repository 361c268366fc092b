"""Recorded steps and uploads: nothing may be read too early, written too early, or kept from the recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from net import reference
from net.gpu import arrays, graph
from tests.gpu import standin
from tests.gpu.conftest import REAL
from tests.gpu.shim import build

SCHEDULES = ("at once", "late", "copies first")


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest, fp32: ModuleType) -> Iterator[str]:
    """When queued work is done; a real GPU decides that itself."""
    if REAL:
        if request.param != "at once":
            pytest.skip("a GPU has its own schedule")
        yield request.param
        return
    arrays.synchronize()
    standin.machine.schedule = request.param
    yield request.param
    standin.machine.schedule = "at once"
    arrays.synchronize()


def update_step(ops: ModuleType, w: Any, v: Any) -> Callable[[dict[str, Any]], Any]:
    """Dropout and an update: what changes from step to step comes with the inputs."""

    def step(inputs: dict[str, Any]) -> Any:
        dropped = ops.dropout_forward(inputs["x"], keep=0.5, scale=1.0, key=(7, inputs["step"], 6))
        rate = inputs["rates"][1:2]
        ops.sgd_update(w, v, dropped, lr=rate, momentum=0.9, decay=0.1)
        loss, _ = ops.cross_entropy(dropped, inputs["labels"])
        return loss

    return step


def batch(number: int, rows: int = 4) -> dict[str, np.ndarray]:
    random = np.random.default_rng(number)
    return {
        "x": random.standard_normal((rows, 6), dtype=np.float32),
        "labels": random.integers(0, 6, rows).astype(np.int32),
        "rates": random.random(2, dtype=np.float32),
        "step": np.array([number + 2**33 * (number % 2)], np.uint64),
    }


def expected_losses(count: int, rows: int = 4) -> tuple[list[np.ndarray], np.ndarray]:
    w, v = np.ones((rows, 6), np.float32), np.zeros((rows, 6), np.float32)
    step = update_step(reference, w, v)
    return [step(batch(i, rows)) for i in range(count)], w


def ring_uploads(ops: ModuleType, numbers: range, rows: int = 4) -> Iterator[dict[str, Any]]:
    """Upload batches from one host buffer, overwritten as soon as upload returns, as the loader does."""
    buffer = {name: ops.host_empty(a.shape, a.dtype) for name, a in batch(0, rows).items()}
    for number in numbers:
        for name, a in batch(number, rows).items():
            buffer[name][...] = a
        uploaded = ops.upload(buffer)
        for a in buffer.values():
            a[...] = 99
        yield uploaded


def test_a_replayed_step_takes_new_rates_and_steps(fp32: ModuleType, schedule: str) -> None:
    expected, weights = expected_losses(7)
    w, v = fp32.asarray(np.ones((4, 6), np.float32)), fp32.asarray(np.zeros((4, 6), np.float32))
    step = fp32.replayable(update_step(fp32, w, v))
    losses = [step(inputs) for inputs in ring_uploads(fp32, range(7))]
    for got, e in zip(losses, expected, strict=True):  # all read at the end: none was overwritten by a later step
        np.testing.assert_allclose(fp32.to_host(got), e, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fp32.to_host(w), weights, rtol=1e-5, atol=1e-6)


def test_a_batch_uploaded_ahead_is_not_overwritten(fp32: ModuleType, schedule: str) -> None:
    """The next batch is uploaded before the step of this one is queued."""
    expected, _ = expected_losses(7)
    w, v = fp32.asarray(np.ones((4, 6), np.float32)), fp32.asarray(np.zeros((4, 6), np.float32))
    step = update_step(fp32, w, v)  # not recorded: it reads the slots themselves
    losses, uploads = [], ring_uploads(fp32, range(7))
    now = next(uploads)
    for following in uploads:
        losses.append(step(now))
        now = following
    losses.append(step(now))
    for got, e in zip(losses, expected, strict=True):
        np.testing.assert_allclose(fp32.to_host(got), e, rtol=1e-5, atol=1e-6)


def test_a_loss_read_a_step_late_does_not_wait_for_the_step_after(fp32: ModuleType, pretended: standin.Machine) -> None:
    w, v = fp32.asarray(np.ones((4, 6), np.float32)), fp32.asarray(np.zeros((4, 6), np.float32))
    step = fp32.replayable(update_step(fp32, w, v))
    losses = [step(inputs) for inputs in ring_uploads(fp32, range(3))]
    fp32.synchronize()
    pretended.schedule = "late"
    losses += [step(inputs) for inputs in ring_uploads(fp32, range(3, 5))]
    waiting = len(standin.current_stream()._queue)
    np.testing.assert_allclose(fp32.to_host(losses[3]), expected_losses(5)[0][3], rtol=1e-5)
    assert 0 < len(standin.current_stream()._queue) < waiting
    fp32.synchronize()


def test_no_memory_is_taken_while_steps_are_replayed(fp32: ModuleType, pretended: standin.Machine) -> None:
    w, v = fp32.asarray(np.ones((4, 6), np.float32)), fp32.asarray(np.zeros((4, 6), np.float32))
    step = fp32.replayable(update_step(fp32, w, v))
    uploads = ring_uploads(fp32, range(20))
    loss = None
    for _ in range(4):
        loss = step(next(uploads))
    before = pretended.allocations
    for inputs in uploads:
        loss = step(inputs)
    assert pretended.allocations == before
    assert np.isfinite(fp32.to_host(loss)).all()


def test_each_batch_shape_has_its_recording(fp32: ModuleType, pretended: standin.Machine) -> None:
    w, v = fp32.asarray(np.ones((4, 6), np.float32)), fp32.asarray(np.zeros((4, 6), np.float32))

    def probabilities(inputs: dict[str, Any]) -> Any:
        return fp32.softmax(inputs["x"])

    predict = fp32.replayable(probabilities)
    step = fp32.replayable(update_step(fp32, w, v))
    for number in range(3):
        for rows in (4, 3, 9):
            (inputs,) = ring_uploads(fp32, range(number, number + 1), rows)
            got = predict(inputs)
            np.testing.assert_allclose(fp32.to_host(got), reference.softmax(batch(number, rows)["x"]), rtol=1e-5)
            if rows == 4:
                step(inputs)
    assert np.isfinite(fp32.to_host(w)).all()


def test_other_work_gets_none_of_a_recordings_memory(fp32: ModuleType, pretended: standin.Machine) -> None:
    """Arrays made between two replays keep their values: a graph writes where it recorded."""
    w, v = fp32.asarray(np.ones((4, 6), np.float32)), fp32.asarray(np.zeros((4, 6), np.float32))
    step = fp32.replayable(update_step(fp32, w, v))
    uploads = ring_uploads(fp32, range(6))
    for _ in range(2):
        step(next(uploads))
    mine = [fp32.asarray(np.full((4, 6), i, np.float32)) for i in range(20)]
    for inputs in uploads:
        step(inputs)
    for i, a in enumerate(mine):
        np.testing.assert_array_equal(fp32.to_host(a), i)


def test_values_that_would_be_recorded_are_noticed(fp32: ModuleType, pretended: standin.Machine) -> None:
    """A learning rate taken as a number stays what it was at the recording: the stand-in shows it, as a GPU would."""
    w, v = fp32.asarray(np.ones((4, 6), np.float32)), fp32.asarray(np.zeros((4, 6), np.float32))
    rate = [0.0]

    def step(inputs: dict[str, Any]) -> Any:
        fp32.sgd_update(w, v, inputs["x"], lr=rate[0], momentum=0.0, decay=0.0)
        return fp32.softmax(inputs["x"])

    step = fp32.replayable(step)
    for number, inputs in enumerate(ring_uploads(fp32, range(4))):
        rate[0] = 0.0 if number < 3 else 1.0
        step(inputs)
    np.testing.assert_array_equal(fp32.to_host(w), 1.0)


def test_waiting_for_the_device_inside_a_recorded_step_is_an_error(
    fp32: ModuleType, pretended: standin.Machine
) -> None:
    def step(inputs: dict[str, Any]) -> Any:
        p = fp32.softmax(inputs["x"])
        fp32.to_host(p)
        return p

    step = fp32.replayable(step)
    uploads = ring_uploads(fp32, range(2))
    step(next(uploads))
    with pytest.raises(RuntimeError, match="capturing"):
        step(next(uploads))
    assert not standin.current_stream().is_capturing()  # and the stream can be used again
    np.testing.assert_array_equal(fp32.to_host(fp32.asarray(np.ones(3, np.float32))), 1)


@pytest.mark.parametrize("broken", ["no wait for the copy", "no wait for the slot", "two slots", "host does not wait"])
def test_uploads_without_their_events_are_caught(
    fp32: ModuleType, pretended: standin.Machine, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Break upload's synchronisation on purpose: one of the schedules must show it."""
    stream, copying = type(arrays.current().stream), arrays._copying()
    if broken == "no wait for the copy":
        original = stream.wait_event
        monkeypatch.setattr(
            stream, "wait_event", lambda self, event: original(self, event) if self is copying else None
        )
        monkeypatch.setattr(standin.Event, "synchronize", lambda self: None)
    elif broken == "no wait for the slot":
        original = stream.wait_event
        monkeypatch.setattr(
            stream, "wait_event", lambda self, event: None if self is copying else original(self, event)
        )
    elif broken == "two slots":
        monkeypatch.setattr(arrays, "_SLOTS", 1)
        arrays._slots.clear()
    else:
        monkeypatch.setattr(standin.Event, "synchronize", lambda self: None)
    wrong = 0
    for schedule in SCHEDULES:
        arrays.synchronize()
        pretended.schedule = schedule
        for check in (test_a_replayed_step_takes_new_rates_and_steps, test_a_batch_uploaded_ahead_is_not_overwritten):
            try:
                check(fp32, schedule)
            except AssertionError:
                wrong += 1
        arrays.synchronize()
    arrays._slots.clear()
    assert wrong


def test_the_pool_of_recordings_is_its_own(fp32: ModuleType, pretended: standin.Machine) -> None:
    with graph._own_pool():
        inside = fp32.empty((3,), "float32")
    outside = fp32.empty((3,), "float32")
    assert inside.data.mem.pool is not outside.data.mem.pool


@pytest.mark.parametrize("broken", [False, True])
def test_a_recording_survives_another_that_runs_out_of_memory(
    fp32: ModuleType, pretended: standin.Machine, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """CuPy's pools give their free blocks back when memory is out; a recording's must not be among them."""
    if broken:
        monkeypatch.setattr(graph, "_for_good", lambda size: graph._allocated(size))
        graph._pool.cache_clear()
    expected, weights = expected_losses(5)
    w, v = fp32.asarray(np.ones((4, 6), np.float32)), fp32.asarray(np.zeros((4, 6), np.float32))
    step = fp32.replayable(update_step(fp32, w, v))
    losses = [step(inputs) for inputs in ring_uploads(fp32, range(3))]
    large = fp32.replayable(lambda inputs: fp32.softmax(inputs["x"]))
    inputs = {"x": fp32.asarray(np.ones((50, 771), np.float32))}  # of a size that no pool has a free block of
    standin._default_pool.free_all_blocks()
    pretended.limit = pretended.allocated
    with pytest.raises(MemoryError, match="batch of 50"):
        large(inputs)
    pretended.limit = None
    if broken:
        (inputs,) = ring_uploads(fp32, range(3, 4))
        with pytest.raises(build.KernelError, match="outside all memory"):
            step(inputs)
        graph._pool.cache_clear()
        return
    losses += [step(inputs) for inputs in ring_uploads(fp32, range(3, 5))]
    for got, e in zip(losses, expected, strict=True):
        np.testing.assert_allclose(fp32.to_host(got), e, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fp32.to_host(w), weights, rtol=1e-5, atol=1e-6)
