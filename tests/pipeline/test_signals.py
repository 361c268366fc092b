"""The first signal is a request, the second an interruption, none is lost, and the handlers of before come back."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import run_pipeline
from pipeline.errors import StoppedError
from pipeline.signals import Interruption, StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_first_signal_is_noted_second_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  what matters is what happens in between
        with StopRequest() as stop:
            assert stop.signum is None
            os.kill(os.getpid(), number)
            assert stop.signum == number
            os.kill(os.getpid(), number)
            pytest.fail("the second signal did not interrupt")
    assert signal.getsignal(number) is before


def test_the_other_signal_interrupts_as_well() -> None:
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signum == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGINT)


def test_nothing_is_changed_without_a_signal() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with StopRequest() as stop:
        pass
    assert stop.signum is None
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


class Something:
    """What a finalizer can be bound to."""


def _in_a_finalizer(act: Callable[[], None]) -> None:
    thing = Something()
    weakref.finalize(thing, act)
    del thing


def _in_a_weak_reference(act: Callable[[], None]) -> None:
    thing = Something()
    kept = weakref.ref(thing, lambda _: act())
    del thing
    assert kept() is None


def _in_the_garbage_collector(act: Callable[[], None]) -> None:
    gc.callbacks.append(lambda phase, info: act() if phase == "start" else None)
    try:
        gc.collect()
    finally:
        gc.callbacks.pop()


@pytest.mark.parametrize("place", [_in_a_finalizer, _in_a_weak_reference, _in_the_garbage_collector])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_that_python_would_ignore_is_not_lost(
    place: Callable[[Callable[[], None]], None],
    number: signal.Signals,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """The handler runs where an exception goes nowhere, twice, and the command line stops all the same."""
    came: list[str] = []

    def stage(options: Any, ranks: Any) -> None:
        def signalled() -> None:
            os.kill(os.getpid(), number)
            came.append("the handler did not raise here")

        place(signalled)
        assert not came, "a signal handled elsewhere shows nothing"
        place(lambda: time.sleep(0.2))  # the next one is lost as well
        time.sleep(20)
        pytest.fail("the signal was lost")

    monkeypatch.setattr(run_pipeline, "_run", stage)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
    before = sys.unraisablehook, *(signal.getsignal(n) for n in numbers)
    assert run_pipeline.main(["--stage", "verify"]) == status
    after = sys.unraisablehook, *(signal.getsignal(n) for n in numbers)
    assert after == before
    told = capfd.readouterr().err
    what = "interrupted" if number == signal.SIGINT else "terminated"
    assert f"{what}; everything finished so far is kept\n" in told
    assert "ignored" not in told
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_no_alarm_outlives_the_block() -> None:
    """It would end a process that has nothing more to do with it."""
    with Interruption():
        _in_a_weak_reference(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_ctrl_c_raises_whatever_it_did_before_but_where_it_is_ignored() -> None:
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler in (signal.SIG_IGN, lambda signum, frame: came.append(signum)):
            signal.signal(signal.SIGINT, handler)
            with pytest.raises(KeyboardInterrupt) if callable(handler) else contextlib.nullcontext(), Interruption():
                os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == []


def test_terminated_in_the_open_raises_at_once_and_other_lost_exceptions_are_still_told() -> None:
    told: list[str] = []
    before, sys.unraisablehook = sys.unraisablehook, lambda what: told.append(str(what.exc_value))
    try:
        with pytest.raises(StoppedError) as caught, Interruption():  # noqa: PT012
            _in_a_weak_reference(lambda: {}["another's"])
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("not terminated")
    finally:
        sys.unraisablehook = before
    assert caught.value.signum == signal.SIGTERM
    assert told == ['"another\'s"']
