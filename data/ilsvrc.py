"""The official ILSVRC-2012 archives, read in place: nothing is extracted.

``ILSVRC2012_img_train.tar`` holds a tar a class, ``<wnid>.tar``, with that class's JPEGs. ``ILSVRC2012_img_val.tar``
holds the validation JPEGs, and ``ILSVRC2012_devkit_t12.tar.gz`` says what they show: line n of its ground truth is the
devkit's class ID (1..1000, in an order of its own) of the picture whose name ends in number n, and ``meta.mat`` gives
each ID its WordNet ID (WNID). Classes are numbered by sorted WNID, as Caffe and torchvision do.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from data import tar
from data.folders import add_class_tar
from data.listing import Listing, Reject, Rows, text
from data.matfile import read_structures
from pipeline.errors import PipelineError

TRAIN: Final = "ILSVRC2012_img_train.tar"
VAL: Final = "ILSVRC2012_img_val.tar"
DEVKIT: Final = "ILSVRC2012_devkit_t12.tar.gz"

_LARGEST_DEVKIT: Final = 64 << 20  # bytes unpacked; the real one has less than half a megabyte
_NUMBER: Final = re.compile(rb"_(\d{1,9})\.[A-Za-z]+$")


@dataclass(frozen=True)
class Devkit:
    """What the devkit says of the classes that pictures can have.

    ``ids`` maps WNID to the devkit's class ID, ``words`` to the class's names; ``ground_truth`` int32 (M,) is the ID
    of validation picture 1, 2, ..., M.
    """

    path: Path
    ids: dict[str, int]
    words: dict[str, str]
    ground_truth: np.ndarray


def read_devkit(path: Path) -> Devkit:
    """Read classes and ground truth from ``ILSVRC2012_devkit_t12.tar.gz``.

    Raises
    ------
    PipelineError
        The file cannot be read, is cut short or damaged, or is something else.
    """
    damaged = f"{path} is damaged or no ILSVRC-2012 devkit"
    try:
        with gzip.open(path) as file:
            unpacked = file.read(_LARGEST_DEVKIT + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise PipelineError(f"{path} is cut short or damaged ({error}); get it again") from error
    except OSError as error:
        raise PipelineError(f"cannot read {path}: {error.strerror or error}") from error
    if len(unpacked) > _LARGEST_DEVKIT:
        raise PipelineError(f"{damaged}: it unpacks to more than {_LARGEST_DEVKIT >> 20} MiB; get it again")
    files = {}
    for member in tar.members(lambda offset, n: unpacked[offset : offset + n], 0, len(unpacked), str(path)):
        files[member.name.rpartition(b"/")[2]] = unpacked[member.offset : member.offset + member.size]
    for name in (b"meta.mat", b"ILSVRC2012_validation_ground_truth.txt"):
        if name not in files:
            raise PipelineError(f"{damaged}: it holds no {name.decode()}; get it again")
    ids, words = _synsets(files[b"meta.mat"], damaged)
    lines = files[b"ILSVRC2012_validation_ground_truth.txt"].split()
    known = set(ids.values())
    truth = [int(line) if line.isdigit() and len(line) < 6 else -1 for line in lines]
    for number, identity in enumerate(truth, start=1):
        if identity not in known:
            raise PipelineError(f"{damaged}: line {number} of its ground truth is no class ID of its meta.mat")
    return Devkit(path, ids, words, np.array(truth, dtype=np.int32))


def _synsets(meta: bytes, damaged: str) -> tuple[dict[str, int], dict[str, str]]:
    """IDs and words of the synsets without children; the others are their common ancestors and have no pictures."""
    try:
        synsets = read_structures(meta, "synsets", ("ILSVRC2012_ID", "WNID", "words", "num_children"))
    except ValueError as error:
        raise PipelineError(f"{damaged}: its meta.mat cannot be read ({error}); get it again") from error
    ids: dict[str, int] = {}
    words: dict[str, str] = {}
    for synset in synsets:
        identity, wnid, children = synset["ILSVRC2012_ID"], synset["WNID"], synset["num_children"]
        if children == 0 and isinstance(wnid, str) and isinstance(identity, int | float) and 1 <= identity <= 65535:
            ids[wnid], words[wnid] = int(identity), str(synset["words"] or wnid)
    if not ids or len(set(ids.values())) != len(ids):
        raise PipelineError(f"{damaged}: the class IDs in its meta.mat are not distinct; get it again")
    return ids, words


def index_train(path: Path, devkit: Devkit) -> tuple[Listing, list[Reject]]:
    """List the training archive in one pass over its headers; labels index the devkit's sorted WNIDs."""
    classes = {wnid: number for number, wnid in enumerate(sorted(devkit.ids))}
    rows = Rows("train", containers=[path])
    with tar.opened(path) as (read, stop):
        for outer in tar.members(read, 0, stop, str(path)):
            name = outer.name.rpartition(b"/")[2]
            wnid, dot, ending = text(name).rpartition(".")
            if name.startswith(b"."):
                continue
            if outer.kind != "file" or not dot or ending != "tar":
                rows.reject(name, f"{outer.kind} in place of a class's tar")
                continue
            if wnid not in classes:
                raise PipelineError(
                    f"{path} holds the class {wnid}, which {devkit.path} does not know; they do not belong together: "
                    "put the devkit of ILSVRC-2012 (task 1 and 2) beside the archives"
                )
            where = f"{path} (its member {text(outer.name)})"
            add_class_tar(rows, read, outer.offset, outer.offset + outer.size, where, wnid, classes[wnid])
    return rows.listing(), rows.rejects


def index_val(path: Path, devkit: Devkit) -> tuple[Listing, list[Reject]]:
    """List the validation archive; labels index the devkit's sorted WNIDs."""
    rows, label = Rows("val", containers=[path]), val_labels(devkit, path)
    with tar.opened(path) as (read, stop):
        for member in tar.members(read, 0, stop, str(path)):
            name = member.name.rpartition(b"/")[2]
            if name.startswith(b"."):
                continue
            if member.kind != "file":
                rows.reject(name, f"it is {member.kind}")
                continue
            shown = label(name)
            if isinstance(shown, str):
                rows.reject(name, shown)
            else:
                rows.add(name, shown, member.size, member.offset)
    return rows.listing(), rows.rejects


def val_labels(devkit: Devkit, where: Path) -> Callable[[bytes], int | str]:
    """What gives a validation picture in ``where`` its label by the number in its name, or says why it has none.

    Labels index the devkit's sorted WNIDs. A number that the ground truth does not have raises a PipelineError.
    """
    of_id = {devkit.ids[wnid]: label for label, wnid in enumerate(sorted(devkit.ids))}
    labels = [of_id[identity] for identity in devkit.ground_truth.tolist()]

    def label(name: bytes) -> int | str:
        number = numbered(name)
        if number is None:
            return "its name has no number that would tell its class"
        if not 1 <= number <= len(labels):
            raise PipelineError(
                f"{where} holds {text(name)}, but the ground truth in {devkit.path} has {len(labels)} lines; "
                "they do not belong together: put the devkit of ILSVRC-2012 (task 1 and 2) there"
            )
        return labels[number - 1]

    return label


def numbered(name: bytes) -> int | None:
    """The number in the name of a validation picture."""
    found = _NUMBER.search(name)
    return int(found[1]) if found else None
