"""Reading ahead for sets larger than memory: whole blocks, in the order training will use them.

The block-wise order (data/sampling.py) uses the pictures of one group of blocks before those of the next. A thread
reads the blocks of the next group from end to end while the loader takes crops from the present one, so the disk sees
long reads only, and it is told of the next few blocks while one is read, so it is never idle in between. What is read
lands in the kernel's page cache, which the memory maps of the shards share; nothing is kept here.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from data.sampling import Crops
from pipeline.errors import PipelineError

Piece = tuple[Path, int, int]  # file, offset, bytes

_READ: Final = 4 << 20  # bytes a read
_AHEAD: Final = 1  # groups read ahead of the one in use
_ANNOUNCED: Final = 3  # blocks the kernel is told of ahead; with none the disk waits at every block's end


def total_memory(root: Path = Path("/")) -> int:
    """Bytes of memory this process may use: the machine's, or the least limit of its control groups.

    A job of Slurm or a container has its limit in a group somewhere above the process. ``root`` is where the system's
    files are.
    """
    least = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in _limits(root):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            least = min(least, int(file.read_text()))
    return least


def _limits(root: Path) -> Iterator[Path]:
    """Files that may limit this process's memory, of both versions of Linux's control groups."""
    groups = root / "sys/fs/cgroup"
    yield groups / "memory.max"  # a container sees its own group here, whatever its name is outside
    yield groups / "memory/memory.limit_in_bytes"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            group = Path(name.lstrip("/"))
            for folder in (group, *group.parents):
                if not controllers:
                    yield groups / folder / "memory.max"
                elif "memory" in controllers.split(","):
                    yield groups / "memory" / folder / "memory.limit_in_bytes"


@contextlib.contextmanager
def reading_ahead(
    plan: Callable[[int], Crops],
    groups_of: Callable[[int], range],
    pieces: Callable[[int], list[Piece]],
    first: int,
    last: int,
) -> Iterator[Callable[[int], Crops]]:
    """A plan for the loader that gives a batch out when its pictures have been read.

    Parameters
    ----------
    plan : callable
        Batch number -> its crops.
    groups_of : callable
        Batch number -> the groups its pictures lie in, numbered through all epochs.
    pieces : callable
        Group number -> the pieces of files to read for it.
    first, last : int
        First batch, and the one after the last.

    A failing read is raised by the plan, at the batch that needs it. The thread ends with the context.
    """
    reader = _Reader(pieces, groups_of(first)[0], groups_of(last - 1)[-1] + 1)
    thread = threading.Thread(target=reader.work, name="read-ahead", daemon=True)
    thread.start()

    def when_read(number: int) -> Crops:
        reader.wait(groups_of(number)[-1])
        return plan(number)

    try:
        yield when_read
    finally:
        reader.close()
        thread.join()


class _Reader:
    """Which group has been read, which is in use. All under one condition."""

    def __init__(self, pieces: Callable[[int], list[Piece]], first: int, last: int) -> None:
        self._pieces, self._read, self._used, self._last = pieces, first, first, last
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None

    def wait(self, group: int) -> None:
        """Note that ``group`` is in use; return when all of it has been read."""
        with self._changed:
            self._used = max(self._used, group)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._error is not None or group < self._read)
            if self._error is not None and group >= self._read:
                raise self._error

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _due(self, group: int) -> bool:
        return self._closed or group <= self._used + _AHEAD

    def work(self) -> None:
        buffer = bytearray(_READ)
        for group in range(self._read, self._last):
            with self._changed:
                self._changed.wait_for(partial(self._due, group))
                if self._closed:
                    return
            try:
                pieces = self._pieces(group)
                for place, piece in enumerate(pieces):
                    for later in pieces[place + _ANNOUNCED if place else 0 : place + _ANNOUNCED + 1]:
                        _announce(later)
                    if not self._warm(piece, buffer):
                        return
            except BaseException as error:  # noqa: BLE001  whatever it is, a worker must raise it and not wait for ever
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._read = group + 1
                self._changed.notify_all()

    def _warm(self, piece: Piece, buffer: bytearray) -> bool:
        """Read a piece into the page cache; False where the reader was closed meanwhile."""
        path, offset, length = piece
        with _opened(path) as handle:
            end = offset + length
            while offset < end and not self._closed:
                done = os.preadv(handle, [memoryview(buffer)[: min(_READ, end - offset)]], offset)
                if not done:
                    break  # cut short since it was opened: the checksum will tell
                offset += done
        return not self._closed


def _announce(piece: Piece) -> None:
    """Have the kernel begin to read a piece; it goes on when the file is closed."""
    if not hasattr(os, "posix_fadvise"):  # macOS has none: the disk waits a little at every block's end
        return
    path, offset, length = piece
    with _opened(path) as handle:
        os.posix_fadvise(handle, offset, length, os.POSIX_FADV_WILLNEED)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file to read; what fails with it is told with its name."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            yield handle
        finally:
            os.close(handle)
    except OSError as error:
        raise PipelineError(f"cannot read {path}: {error.strerror or error}") from error
