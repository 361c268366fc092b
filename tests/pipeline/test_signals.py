"""The first signal is a request, the second an interruption, and the handlers of before come back."""

from __future__ import annotations

import os
import signal

import pytest

from pipeline.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        pass
    assert stop.signum is None
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
