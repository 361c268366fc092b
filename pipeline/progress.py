"""How long work shows itself: a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import threading
import time
from typing import Final

from tqdm import tqdm

MB: Final = 1_000_000
LINE_SECONDS: Final = 5.0  # at most one plain line so often


class Progress:
    """Count ``total`` units of work on standard error.

    On a terminal this is a tqdm bar with rate and remaining time; elsewhere a plain line every few seconds and one
    at the end. Use as a context manager.
    """

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._first = self._done = done
        self._start = self._last_line = time.monotonic()
        self._fields = ""
        self._told = done, self._fields  # what the last plain line said
        terminal = sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, initial=done, desc=title, unit=f" {unit}", dynamic_ncols=True) if terminal else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif (self._done, self._fields) != self._told:
            self._line()

    def advance(self, count: int) -> None:
        """Note ``count`` more units done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._line()

    def show(self, fields: str) -> None:
        """Show ``fields`` (such as "loss 2.31") from the next advance on, until they are replaced."""
        self._fields = fields
        if self._bar is not None:
            self._bar.set_postfix_str(fields, refresh=False)

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _line(self) -> None:
        self._last_line, self._told = time.monotonic(), (self._done, self._fields)
        rate = (self._done - self._first) / max(self._last_line - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        speed = f"{rate:.3g}" if rate < 999.5 else f"{rate:,.0f}"
        text = f"{self._title}: {self._done}/{self._total} {self._unit}, {speed}/s, {duration(left)} left"
        print(f"{text}, {self._fields}" if self._fields else text, file=sys.stderr, flush=True)


class Megabytes:
    """Bytes read, by several threads perhaps, shown as a progress in whole megabytes of 10^6 bytes."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._bytes = self._shown = 0

    def add(self, count: int) -> None:
        with self._lock:
            self._bytes += count
            more = megabytes(self._bytes) - self._shown
            if more:
                self._progress.advance(more)
                self._shown += more


def megabytes(size: int) -> int:
    """Megabytes, the last begun one counted whole."""
    return -(-size // MB)


def volume(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
