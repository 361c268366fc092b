"""The pictures of a split as one sequence: its shards mapped into memory, each picture checked when first used."""

from __future__ import annotations

import contextlib
import os
import resource
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.shards import Layout, Located, locate
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir


@dataclass(frozen=True)
class Split:
    """The pictures of a split, mapped into memory and read only.

    Attributes
    ----------
    images : list of uint8 (n_i, size, size, 3)
        One memory map a shard, as plain arrays: a slice of ``np.memmap`` takes six times as long.
    starts : int64 (shards + 1,)
        Row of each shard's first picture in the split; the last entry is the number of pictures.
    labels : int32 (N,)
        All labels.
    crc : uint32 (N,)
        CRC-32 of each picture.
    checked : bool (N,)
        Which pictures this process has compared with their CRC-32.
    """

    folder: Path
    files: tuple[str, ...]
    images: list[np.ndarray]
    starts: np.ndarray
    labels: np.ndarray
    crc: np.ndarray
    checked: np.ndarray
    offsets: tuple[int, ...]  # bytes in each file before its first picture

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def _firsts(self) -> list[int]:
        """``starts`` as Python's numbers: looking up one picture in them is ten times as fast."""
        return self.starts.tolist()

    def row(self, index: int) -> np.ndarray:
        """Picture ``index``, uint8 (size, size, 3), a view of the memory map.

        Raises
        ------
        PipelineError
            The picture is not the one that was written; found the first time it is used.
        """
        shard = bisect_right(self._firsts, index) - 1
        picture = self.images[shard][index - self._firsts[shard]]
        if not self.checked[index]:
            self._check(index)
        return picture

    def _check(self, index: int) -> None:
        """Read a picture and compare it with its checksum.

        It is read, not looked at through the map: where a disk cannot read mapped bytes the process dies.
        """
        path, offset, size = self.pieces(index, index + 1)[0]
        command = f"python run_pipeline.py --stage verify {RunDir(path.parent.parent).flag}"
        again = f"run {command}, which finds all damage and says how to mend it"
        try:
            with open(path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise PipelineError(f"{path} cannot be read at picture {index} ({error.strerror}): {again}") from error
        if zlib.crc32(data) != self.crc[index]:
            raise PipelineError(f"{path} is damaged in picture {index}: {again}")
        self.checked[index] = True

    def pieces(self, first: int, last: int) -> list[tuple[Path, int, int]]:
        """Where the pictures ``first`` to ``last - 1`` lie: file, offset and bytes of each piece."""
        found = []
        for shard, file in enumerate(self.files):
            start, stop = max(first, int(self.starts[shard])), min(last, int(self.starts[shard + 1]))
            if start < stop:
                size = self.images[shard][0].nbytes
                offset = self.offsets[shard] + (start - int(self.starts[shard])) * size
                found.append((self.folder / file, offset, (stop - start) * size))
        return found


def open_split(folder: Path, manifest: dict[str, Any], split: str) -> Split:
    """Map a split's shards into memory.

    Parameters
    ----------
    folder : Path
        The run's ``preprocess`` folder.
    manifest : dict
        As ``data.manifest.read_manifest`` gave it.
    split : str
        "train" or "val".

    Raises
    ------
    PipelineError
        A shard is not what the manifest describes, or is laid out in a way that could not be mapped safely.
    """
    entries = manifest["splits"][split]["shards"]
    layout = Layout(split, manifest["plan"], manifest["size"], manifest["filter"])
    _allow_open_files(len(entries))
    paths = [folder / entry["file"] for entry in entries]
    found = [locate(path, layout, entry, manifest["classes"]) for path, entry in zip(paths, entries, strict=True)]
    counts = [len(shard.labels) for shard in found]
    return Split(
        folder=folder,
        files=tuple(entry["file"] for entry in entries),
        images=[_mapped(path, shard) for path, shard in zip(paths, found, strict=True)],
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        labels=np.concatenate([shard.labels for shard in found]),
        crc=np.concatenate([shard.crc for shard in found]),
        checked=np.zeros(sum(counts), dtype=bool),
        offsets=tuple(shard.offset for shard in found),
    )


def _mapped(path: Path, shard: Located) -> np.ndarray:
    """A shard's pictures."""
    if not len(shard.labels):
        return np.empty(shard.shape, dtype=np.uint8)
    return np.asarray(np.memmap(path, np.uint8, "r", shard.offset, shard.shape))


def _allow_open_files(count: int) -> None:
    """Raise the process's limit of open files: each memory map holds one, and 1024 is a common limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + count
    if soft != resource.RLIM_INFINITY:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        # macOS allows less than its limit says; the files may still be few enough.
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
