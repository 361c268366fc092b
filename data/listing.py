"""The pictures of a split as a table: where each one's bytes lie, what it is called, which class it shows.

A row costs about 60 bytes, so the 1,281,167 pictures of ILSVRC's training set take less than 100 MB.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np

LONGEST_NAME: Final = 255  # bytes of "<class>/<file>"; names have fixed width in the table and in the shards
LARGEST_FILE: Final = 256 << 20  # bytes; no photograph comes near
SPLITS: Final = ("train", "val")


@dataclass(frozen=True)
class Reject:
    """A picture that is in no shard, and why."""

    split: str
    name: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """The pictures of a split.

    Attributes
    ----------
    containers : tuple of Path
        The archives or folders the pictures lie in.
    container : int32 (N,)
        Index into ``containers``.
    offset : int64 (N,)
        Byte offset in the archive; -1 where the container is a folder and the picture a file of its own.
    size : int64 (N,)
        Length in bytes.
    label : int32 (N,)
        Class.
    name : bytes (N,)
        ``<class>/<file name>``, or the file name alone in the official validation archive.
    """

    containers: tuple[Path, ...]
    container: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    name: np.ndarray

    def __len__(self) -> int:
        return len(self.name)

    def take(self, rows: np.ndarray) -> Listing:
        """The rows with these indices, with only the containers they need."""
        used, container = np.unique(self.container[rows], return_inverse=True)
        return Listing(
            containers=tuple(self.containers[i] for i in used.tolist()),
            container=container.astype(np.int32),
            offset=self.offset[rows],
            size=self.size[rows],
            label=self.label[rows],
            name=self.name[rows],
        )


@dataclass
class Rows:
    """Collects a listing row by row; what cannot become a row goes to ``rejects``."""

    split: str
    containers: list[Path] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    _container: array[int] = field(default_factory=lambda: array("i"))
    _offset: array[int] = field(default_factory=lambda: array("q"))
    _size: array[int] = field(default_factory=lambda: array("q"))
    _label: array[int] = field(default_factory=lambda: array("i"))
    _name: list[bytes] = field(default_factory=list)

    def add(self, name: bytes, label: int, size: int, offset: int = -1) -> None:
        """A picture in the last container."""
        if len(name) > LONGEST_NAME:
            self.reject(name, f"its name is longer than {LONGEST_NAME} bytes")
        elif size > LARGEST_FILE:
            self.reject(name, f"the file has {size} bytes; more than {LARGEST_FILE} are not read")
        else:
            self._container.append(len(self.containers) - 1)
            self._offset.append(offset)
            self._size.append(size)
            self._label.append(label)
            self._name.append(name)

    def reject(self, name: bytes, reason: str) -> None:
        self.rejects.append(Reject(self.split, text(name[:LONGEST_NAME]), reason))

    def listing(self) -> Listing:
        """The rows sorted by name, so that the order is that of no archive and no file system.

        Of several pictures with one name the first is taken, the others are rejected.
        """
        name = np.array(self._name, dtype="S") if self._name else np.empty(0, "S1")
        order = np.argsort(name, kind="stable")
        name = name[order]
        again = np.zeros(len(name), dtype=bool)
        again[1:] = name[1:] == name[:-1]
        for copy in name[again].tolist():
            self.reject(copy, "a second picture of this name")
        order = order[~again]
        return Listing(
            containers=tuple(self.containers),
            container=np.array(self._container, dtype=np.int32)[order],
            offset=np.array(self._offset, dtype=np.int64)[order],
            size=np.array(self._size, dtype=np.int64)[order],
            label=np.array(self._label, dtype=np.int32)[order],
            name=name[~again],
        )


def relabelled(listing: Listing, classes: np.ndarray) -> Listing:
    """The listing with label ``i`` replaced by ``classes[i]``."""
    return replace(listing, label=classes.astype(np.int32)[listing.label])


def shuffled(pictures: int, seed: int, split: str) -> np.ndarray:
    """The order in which a split is written: a permutation of range(pictures), int64.

    Each picture draws a 64-bit number from NumPy's Philox generator, whose raw stream NumPy guarantees; the pictures
    are sorted by it.
    """
    purpose = 8 + SPLITS.index(split)  # no stream of data/sampling.py has such a key
    draws = np.random.Philox(key=np.array([seed, purpose << 32], dtype=np.uint64)).random_raw(pictures)
    return np.argsort(draws, kind="stable")


def digest(listing: Listing) -> str:
    """SHA-256 over names, sizes and labels: what the listing is, wherever it lies."""
    total = hashlib.sha256()
    for column in (listing.name, listing.size, listing.label):
        total.update(f"{column.dtype.str} {len(column)} ".encode())
        total.update(np.ascontiguousarray(column).data)
    return total.hexdigest()


def text(name: bytes) -> str:
    """A file name for people and for JSON; bytes that are no UTF-8 are written as escapes."""
    return name.decode("utf-8", "backslashreplace")
