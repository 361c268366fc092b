"""Standard input, output and error where they are closed, have no reader, cannot be written, or lack letters."""

from __future__ import annotations

import io
import os
import select
import sys


def open_streams() -> None:
    """Open those of standard input, output and error that are closed, on the null device.

    Their numbers would go to the next files opened, and what a library says on standard error would stand in one of
    those. Standard output is made to take every name, as standard error does: letters that its encoding lacks are
    written as escapes.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)  # for worker processes
    os.close(number)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def unread() -> bool:
    """Whether what is printed has no reader any more; else it was another pipe that broke, such as one to a cluster."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)  # errors are told unasked
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def unwritable() -> bool:
    """Whether standard output is what has failed. An empty line finds out, which after a failure does no harm."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def discard_output() -> None:
    """Let nothing more go to standard output: Python flushes it once more when it ends, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def can_show(text: str) -> bool:
    """Whether standard output has these letters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
