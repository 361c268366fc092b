"""One shard from its pictures: read, decode, gather colour sums, write. This is what a worker process does.

A worker's memory is the shard it fills (size^2 x 3 bytes a picture) and the picture it decodes, whatever the size of
the set.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from data.color import ColorSum
from data.images import TURNED, UnreadableError, decoder, read_square
from data.listing import Listing, text
from data.shards import Content, Layout, checksum, read_shard, shard_name, write_shard
from pipeline.errors import PipelineError
from pipeline.run_dir import hash_file

_MAXRSS_UNIT: Final = 1 if sys.platform == "darwin" else 1024  # bytes: macOS counts in bytes, others in KiB


@dataclass(frozen=True)
class ShardTask:
    """A slice of the shuffled split, to become shard ``index`` in ``folder``.

    ``devkit_ids`` int32 holds each class's devkit ID, -1 where not known. ``known`` is the SHA-256 of the finished
    shard where one was written before. ``decoder`` is what the plan was made with, ``upright`` whether pictures are
    turned as their EXIF data say. ``parent`` is the process that gave the task, None where it came from a cluster's
    scheduler.
    """

    folder: Path
    layout: Layout
    index: int
    pictures: Listing
    devkit_ids: np.ndarray
    known: str | None
    decoder: dict[str, str]
    upright: bool
    parent: int | None


@dataclass(frozen=True)
class ShardResult:
    """A finished shard; ``temporary`` is the file to be put in place, None where the old one was kept."""

    file: str
    split: str
    temporary: Path | None
    sha256: str
    bytes: int
    content: Content  # without the pictures
    seconds: float
    peak_memory: int  # bytes, of the process
    turned: int = 0  # pictures read now whose EXIF data say that they are to be turned


def make_shard(task: ShardTask) -> ShardResult:
    """Make a shard, or keep the one that is there where its hash is the known one.

    Raises
    ------
    PipelineError
        A picture's file or archive cannot be read any more, the shard cannot be written, or this machine decodes
        pictures in another way than the one that made the plan.
    """
    here = decoder(task.decoder["name"].lower())
    if here != task.decoder:
        raise PipelineError(
            f"{socket.gethostname()} decodes pictures with {_versions(here)}, but this run is made with "
            f"{_versions(task.decoder)}; install the same packages on all machines, or the shards' bytes would differ"
        )
    if task.parent is not None and os.getpid() != task.parent:
        # Ctrl-C on a terminal reaches every process; it is the parent who decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _end_with_parent(task.parent)
    start = time.perf_counter()
    path = task.folder / shard_name(task.layout.split, task.index)
    content = _kept(task, path)
    if content is not None and task.known is not None:
        return _result(task, path, None, task.known, content, 0, start)
    # Named after machine and process: a worker that outlives a killed parent, or that a scheduler has given up, must
    # not touch its successor's file.
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        content, turned = _convert(task)
        sha256 = write_shard(temporary, task.layout, task.index, content)
        return _result(task, path, temporary, sha256, content, turned, start)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise PipelineError(f"cannot find {temporary}, just written: {error.strerror or error}") from error
        raise


def _versions(versions: dict[str, str]) -> str:
    return f"{versions['name']} {versions['version']} and libjpeg {versions['jpeg']}"


@functools.cache  # one thread a process
def _end_with_parent(parent: int) -> None:
    """End this process soon after its parent: one that was killed could not end its workers, and nobody needs them."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _kept(task: ShardTask, path: Path) -> Content | None:
    if task.known is None or not path.is_file():
        return None
    try:
        content = read_shard(path, task.layout) if hash_file(path) == task.known else None
    except (PipelineError, OSError):
        return None  # whatever is wrong with it, it is made again
    # The plan is the same with and without a devkit, which may have come since.
    if content is None or not np.array_equal(content.devkit_id, task.devkit_ids[content.labels]):
        return None
    return content


def _convert(task: ShardTask) -> tuple[Content, int]:
    """The shard's content, and how many pictures' EXIF data say that they are to be turned."""
    pictures, size = task.pictures, task.layout.size
    images = np.empty((len(pictures), size, size, 3), dtype=np.uint8)
    rejects: dict[int, str] = {}
    noted: Counter[str] = Counter()
    decoded_by = task.decoder["name"].lower()
    color, crc = ColorSum(size), np.empty(len(pictures), dtype=np.uint32)
    for row, data in read_files(pictures):
        try:
            images[row] = read_square(data, size, task.layout.filter, noted, decoder=decoded_by, upright=task.upright)
        except UnreadableError as error:
            rejects[row] = str(error)
        else:  # at once: the picture is still in the cache
            color.add(images[row])
            crc[row] = checksum(images[row])
    rows = np.array([row for row in range(len(pictures)) if row not in rejects], dtype=np.int64)
    for place, row in enumerate(rows.tolist()):  # close the gaps in place: a copy would double the memory
        if place != row:
            images[place] = images[row]
    turned = noted.pop(TURNED, 0)  # no warning, and a shard's bytes are what they were
    content = Content(
        images=images[: len(rows)],
        labels=pictures.label[rows],
        devkit_id=task.devkit_ids[pictures.label[rows]],
        source=pictures.name[rows],
        crc=crc[rows],
        total=color.picture,
        moments=color.moments(),
        rejects=[(text(pictures.name[row]), rejects[row]) for row in sorted(rejects)],
        warnings=dict(noted),
    )
    return content, turned


def read_files(pictures: Listing) -> Iterator[tuple[int, bytes]]:
    """Each row with its file's bytes, in the order they lie on the disk.

    Raises
    ------
    PipelineError
        A file or archive cannot be read any more, or is shorter than when it was listed.
    """
    container, handle = -1, -1
    with contextlib.ExitStack() as archive:  # the one that is open, closed before the next
        try:
            for row in np.lexsort((pictures.offset, pictures.container)).tolist():
                offset, length = int(pictures.offset[row]), int(pictures.size[row])
                path = pictures.containers[int(pictures.container[row])]
                if offset < 0:
                    path = path / os.fsdecode(pictures.name[row]).rpartition("/")[2]
                    yield row, path.read_bytes()
                    continue
                if pictures.container[row] != container:
                    archive.close()
                    handle = os.open(path, os.O_RDONLY)
                    archive.callback(os.close, handle)
                    container = int(pictures.container[row])
                data = os.pread(handle, length, offset)
                if len(data) != length:
                    raise PipelineError(f"{path} is shorter than when it was listed; get it again")
                yield row, data
        except OSError as error:
            raise PipelineError(f"cannot read {path}: {error.strerror or error}") from error


def _result(
    task: ShardTask, path: Path, temporary: Path | None, sha256: str, content: Content, turned: int, start: float
) -> ShardResult:
    return ShardResult(
        file=path.name,
        split=task.layout.split,
        temporary=temporary,
        sha256=sha256,
        bytes=(temporary or path).stat().st_size,
        content=replace(content, images=None),
        turned=turned,
        seconds=time.perf_counter() - start,
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT,
    )
