"""The HDF5 shard: its schema, its writer and its reader (``data/split.py`` maps the pictures of a whole split).

A shard holds a slice of the shuffled split:

==================  =======================  ==========================================================
``images``          uint8 (N, size, size, 3)  RGB; contiguous and uncompressed, so that a memory map serves it
``labels``          int32 (N,)               class, by sorted WNID
``devkit_id``       int32 (N,)               the official devkit's class ID, -1 where not known
``source``          bytes (N,)               the picture's name in the source
``crc``             uint32 (N,)              CRC-32 of each picture, checked when a process first uses it
``sum``             uint32 (size, size, 3)   sum of the pictures, for the mean picture
``rejects``         uint8                    JSON: [name, reason] of each picture of the slice that is left out
``warnings``        uint8                    JSON: the decoder's warnings by kind, with counts
==================  =======================  ==========================================================

and the attributes ``schema``, ``split``, ``index``, ``plan`` (fingerprint of everything that decides the bytes),
``size``, ``filter``, ``resize``, ``label_order`` and ``moments`` (see data/color.py).

Shards are data from elsewhere as far as the reader is concerned: links, filters, external or virtual storage, other
types and shapes are refused before anything is read by them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np

from data.origin import remedy
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir, write_error

SCHEMA: Final = 1
LABEL_ORDER: Final = "sorted WNID"
RULE: Final = "short side to size, centre crop"  # data/images.py's; a shard made with another is refused

_ALIGNMENT: Final = 4096  # a page: mapped pictures then start on one
_PIECE: Final = 256 << 10  # bytes written at a time
_LONGEST_JSON: Final = 64 << 20  # bytes of a shard's rejects or warnings
# What h5py raises on files that are damaged.
_DAMAGE: Final = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Layout:
    """What is the same in all shards of a split, and stands in their attributes."""

    split: str
    plan: str
    size: int
    filter: str


@dataclass(frozen=True)
class Content:
    """A shard's content; see the table above. ``images`` is None where it was not asked for."""

    images: np.ndarray | None
    labels: np.ndarray
    devkit_id: np.ndarray
    source: np.ndarray
    crc: np.ndarray
    total: np.ndarray
    moments: np.ndarray
    rejects: list[tuple[str, str]]
    warnings: dict[str, int]


def shard_name(split: str, index: int) -> str:
    """A shard's file name; shards of a split are numbered from 0."""
    return f"{split}-{index:05d}.h5"


def shard_bytes(images: int, size: int) -> int:
    """About how many bytes a shard takes, for the disk that is needed."""
    return images * (size * size * 3 + 300) + size * size * 12 + 3 * _ALIGNMENT


def checksum(image: np.ndarray) -> int:
    """CRC-32 of a picture."""
    return zlib.crc32(image.data)


def index_hash(labels: np.ndarray, crc: np.ndarray) -> str:
    """SHA-256 of a shard's labels and checksums, which the manifest holds: with it every label and pixel is sealed."""
    return hashlib.sha256(labels.astype("<i4").tobytes() + crc.astype("<u4").tobytes()).hexdigest()


def write_shard(path: Path, layout: Layout, index: int, content: Content) -> str:
    """Write a shard to ``path``.

    Returns the SHA-256 of the file, which is taken from the bytes on their way, not from the disk: what the disk made
    of them is for ``--stage verify`` to find.

    Raises
    ------
    PipelineError
        The disk is full, the folder cannot be written, and the like.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "wb", buffering=0) as raw:
            for part in parts(layout, index, content):
                _write(raw, part, digest)
    except OSError as error:
        raise write_error(path, error) from error
    return digest.hexdigest()


def parts(layout: Layout, index: int, content: Content) -> list[memoryview]:
    """A shard's file in pieces that follow each other; the pictures are one of them, not copied.

    The bytes depend on the arguments alone (and on the HDF5 library's version).
    """
    images = content.images
    assert images is not None
    attributes = {
        "schema": SCHEMA,
        "split": layout.split,
        "index": index,
        "plan": layout.plan,
        "size": layout.size,
        "filter": layout.filter,
        "resize": RULE,
        "label_order": LABEL_ORDER,
        "moments": content.moments,
    }
    small = {
        "labels": content.labels.astype("<i4"),
        "devkit_id": content.devkit_id.astype("<i4"),
        "source": content.source,
        "crc": content.crc.astype("<u4"),
        "sum": content.total.astype("<u4"),
        "rejects": _bytes(content.rejects),
        "warnings": _bytes(content.warnings),
    }
    # HDF5 lays out the file in memory, with everything but the pictures, and plain writes put it on the disk: they tell
    # a full disk as what it is, and the pictures need no second copy.
    frame = _Frame()
    with h5py.File(frame, "w", alignment_threshold=_ALIGNMENT, alignment_interval=_ALIGNMENT) as file:
        for name, value in attributes.items():
            file.attrs[name] = value
        for name, array in small.items():
            file.create_dataset(name, data=array, track_times=False)
        offset = _reserve(file, images.shape)
    buffer, pixels = frame.getbuffer()[: frame.length], np.ascontiguousarray(images).reshape(-1).data
    first = len(buffer) if offset is None else offset
    last = first + len(pixels)
    # HDF5 fills neither the gap before the pictures, which start on a page, nor their own space; in small shards
    # some of what it wrote lies behind them.
    found = [buffer[:first], memoryview(bytes(max(first - len(buffer), 0))), pixels, buffer[last:]]
    return [*found, memoryview(bytes(frame.length - sum(map(len, found))))]


class _Frame(io.BytesIO):
    """A file in memory in which HDF5 may set aside space at the end that it does not fill."""

    length = 0

    def truncate(self, size: int | None = None) -> int:
        self.length = self.tell() if size is None else size
        return self.length


def _write(raw: io.FileIO, data: memoryview, digest: hashlib._Hash) -> None:
    while data:
        # In pieces that are still in the cache when they are hashed.
        written = data[: raw.write(data[:_PIECE])]
        digest.update(written)
        data = data[len(written) :]


def _reserve(file: h5py.File, shape: tuple[int, ...]) -> int | None:
    """Create ``images`` with its space set aside but not written; its offset in the file, None where it is empty."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    dataset = h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, h5py.h5s.create_simple(shape), creation)
    return dataset.get_offset()


def read_shard(path: Path, layout: Layout | None = None) -> Content:
    """Read everything but the pictures.

    Raises
    ------
    PipelineError
        The file is damaged, or no shard of this ``layout``.
    """
    with _opened(path) as file:
        size = _whole(file, "size")
        images = _images(file, size)
        count = images.shape[0]
        if layout is not None and _layout(file) != layout:
            raise ValueError("it belongs to another split, source or configuration")
        return Content(
            images=None,
            labels=_array(file, "labels", "<i4", (count,)),
            devkit_id=_array(file, "devkit_id", "<i4", (count,)),
            source=_names(file, count),
            crc=_array(file, "crc", "<u4", (count,)),
            total=_array(file, "sum", "<u4", (size, size, 3)),
            moments=_moments(file),
            rejects=[(str(name), str(reason)) for name, reason in _json(file, "rejects", list)],
            warnings={str(kind): int(n) for kind, n in _json(file, "warnings", dict).items()},
        )


def read_layout(path: Path) -> Layout:
    """The layout a shard was made with."""
    with _opened(path) as file:
        return _layout(file)


@dataclass(frozen=True)
class Located:
    """Where a shard's pictures lie in its file, with their labels and checksums."""

    offset: int  # in bytes
    shape: tuple[int, int, int, int]  # (N, size, size, 3), uint8
    labels: np.ndarray
    crc: np.ndarray


def locate(path: Path, layout: Layout, entry: dict[str, Any], classes: int) -> Located:
    """Where the pictures of a shard lie, which the manifest describes by ``entry``.

    Raises
    ------
    PipelineError
        It is not what the manifest describes, or is laid out in a way that could not be mapped safely.
    """
    with _opened(path) as file:
        images, count = _images(file, layout.size), entry["images"]
        if _layout(file) != layout or images.shape[0] != count:
            raise ValueError("it is not the shard the manifest describes")
        labels, crc = _array(file, "labels", "<i4", (count,)), _array(file, "crc", "<u4", (count,))
        if index_hash(labels, crc) != entry["index"]:
            raise ValueError("its labels or checksums are not those that were written")
        if count and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError("it has labels of classes that do not exist")
        return Located(images.id.get_offset() or 0, images.shape, labels, crc)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """A shard opened for reading; whatever goes wrong inside is told as damage of this file."""
    try:
        if not path.is_file():
            raise OSError("it does not exist")
        with h5py.File(path, "r", locking=False) as file:
            if _whole(file, "schema") != SCHEMA:
                raise ValueError("it has another schema")
            yield file
    except _DAMAGE as error:
        raise PipelineError(
            f"{path} is not usable ({str(error)[:200]}); remove it and {remedy(RunDir(path.parent.parent))}"
        ) from error


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """A data set whose values lie in this file, as they are and in one piece."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is missing or a link to elsewhere")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{name} is no data set")
    creation = dataset.id.get_create_plist()
    if creation.get_layout() != h5py.h5d.CONTIGUOUS or creation.get_external_count() or creation.get_nfilters():
        raise ValueError(f"{name} is chunked, compressed, virtual or stored elsewhere")
    if dataset.dtype.hasobject or dataset.dtype.kind not in "uiS":
        raise ValueError(f"{name} has the type {dataset.dtype}")
    offset = dataset.id.get_offset()
    if dataset.size and (offset is None or offset + dataset.nbytes > os.stat(file.filename).st_size):
        raise ValueError(f"{name} reaches beyond the end of the file")
    return dataset


def _images(file: h5py.File, size: int) -> h5py.Dataset:
    images = _dataset(file, "images")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise ValueError(f"images has the type {images.dtype} and shape {images.shape}")
    return images


def _array(file: h5py.File, name: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    dataset = _dataset(file, name)
    if dataset.dtype != np.dtype(kind) or dataset.shape != shape:
        raise ValueError(f"{name} has the type {dataset.dtype} and shape {dataset.shape}")
    return dataset[()]


def _names(file: h5py.File, count: int) -> np.ndarray:
    dataset = _dataset(file, "source")
    if dataset.dtype.kind != "S" or dataset.shape != (count,):
        raise ValueError(f"source has the type {dataset.dtype} and shape {dataset.shape}")
    return dataset[()]


def _layout(file: h5py.File) -> Layout:
    if _text(file, "resize") != RULE or _text(file, "label_order") != LABEL_ORDER:
        raise ValueError("it was made with another resize rule or label order")
    return Layout(_text(file, "split"), _text(file, "plan"), _whole(file, "size"), _text(file, "filter"))


def _attribute(file: h5py.File, name: str, largest: int) -> Any:
    kind = file.attrs.get_id(name)
    if kind.shape not in ((), (4, 4)) or kind.get_storage_size() > largest:
        raise ValueError(f"its attribute {name} is damaged")
    return file.attrs[name]


def _whole(file: h5py.File, name: str) -> int:
    value = _attribute(file, name, 8)
    if not isinstance(value, np.integer):
        raise ValueError(f"its attribute {name} is no whole number")
    return int(value)


def _text(file: h5py.File, name: str) -> str:
    value = _attribute(file, name, 4096)
    if not isinstance(value, str):
        raise ValueError(f"its attribute {name} is no text")
    return value


def _moments(file: h5py.File) -> np.ndarray:
    value = _attribute(file, "moments", 128)
    if not isinstance(value, np.ndarray) or value.dtype != np.int64 or value.shape != (4, 4):
        raise ValueError("its attribute moments is damaged")
    return value


def _bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value, sort_keys=True).encode(), dtype=np.uint8)


def _json(file: h5py.File, name: str, kind: type) -> Any:
    dataset = _dataset(file, name)
    if dataset.dtype != np.uint8 or dataset.ndim != 1 or dataset.size > _LONGEST_JSON:
        raise ValueError(f"{name} is no text")
    value = json.loads(dataset[()].tobytes())
    if not isinstance(value, kind):
        raise ValueError(f"{name} is no {kind.__name__}")
    return value
