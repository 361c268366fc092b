"""Work that nobody waits for within a step, on a stream of its own beside the rest.

An update reads and writes 20 bytes a parameter and computes next to nothing, while the backward pass of the
convolutions keeps the tensor cores busy: together they take less time than one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from net.gpu.device import current, event_on
from net.layers import Array

_held: list[Array] = []  # what the work reads: its memory must not be given to others before it has been done
_allowed = False


@contextmanager
def allowed() -> Iterator[None]:
    """Within, :func:`run` goes to the other stream; at the end the backend's stream waits for all of it."""
    global _allowed
    _allowed = True
    try:
        yield
        if _held:
            current().stream.wait_event(event_on(_stream()))
    finally:
        _allowed = False
        _held.clear()


def run(work: Callable[[], None], reads: Array) -> None:
    """Queue ``work`` beside what is queued next, after all that is queued already; elsewhere simply queue it.

    ``reads`` may be given up by the caller; what the work writes must not be touched until :func:`allowed` has ended.
    """
    if not _allowed:
        work()
        return
    _stream().wait_event(event_on(current().stream))
    # Not `with`, which leaves CuPy on its default stream: it does not know the one that was chosen by use().
    _stream().use()
    try:
        work()
    finally:
        current().stream.use()
    _held.append(reads)


@cache
def _stream() -> Any:
    return current().cupy.cuda.Stream(non_blocking=True)
