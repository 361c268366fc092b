"""SIGINT, SIGTERM and SIGUSR1: a request (the stage finishes its step, saves and stops), or an exception that is not
lost.

SIGUSR1 is for launchers: Open MPI's gives its ranks a quarter of a second after a SIGTERM before it kills them, but
hands SIGUSR1 on and waits.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Final

from pipeline.errors import StoppedError

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_RAISING: Final = (signal.SIGTERM, signal.SIGUSR1)  # SIGINT does so by itself
_AGAIN: Final = 0.02  # seconds after which an exception that was lost is raised anew


class StopRequest:
    """Within its ``with`` block the first signal only sets :attr:`signum`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> StopRequest:
        self._before = [signal.signal(number, self._note) for number in _SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(_SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum


class Interruption:
    """Within its ``with`` block SIGTERM and SIGUSR1 raise :class:`StoppedError`, Ctrl-C KeyboardInterrupt, and neither
    gets lost.

    A signal's handler runs wherever Python happens to be. In a finalizer, or in Python code that C has called, an
    exception goes nowhere: the interpreter says "Exception ignored in" and goes on as if no signal had come. It tells
    ``sys.unraisablehook``, and here that sets an alarm, which raises the exception anew a moment later, and again until
    it has come through. An alarm and no thread: a finalizer runs at any point, while locks are held as well.
    """

    def __enter__(self) -> Interruption:
        self._lost: int | None = None
        self._hook = sys.unraisablehook
        self._interrupt = signal.getsignal(signal.SIGINT)
        if callable(self._interrupt):  # else it is ignored, as in what a shell has put into the background
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._terminate = [signal.signal(number, self._raise) for number in _RAISING]
        self._alarm = signal.signal(signal.SIGALRM, self._raise_anew)
        sys.unraisablehook = self._unraisable
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = self._hook
        signal.signal(signal.SIGALRM, self._alarm)
        for number, handler in zip(_RAISING, self._terminate, strict=True):
            signal.signal(number, handler)
        if callable(self._interrupt):
            signal.signal(signal.SIGINT, self._interrupt)

    def _raise(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise StoppedError(signum, "terminated; everything finished so far is kept")

    def _raise_anew(self, signum: int, frame: FrameType | None) -> None:
        lost, self._lost = self._lost, None
        if lost is not None:
            self._raise(lost, frame)

    def _unraisable(self, what: sys.UnraisableHookArgs) -> None:
        if isinstance(what.exc_value, StoppedError):
            self._lost = what.exc_value.signum
        elif isinstance(what.exc_value, KeyboardInterrupt):
            self._lost = signal.SIGINT
        else:
            self._hook(what)
            return
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
