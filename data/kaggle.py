"""ImageNet as Kaggle hands it out: its folders lie deep, and two files at the top name pictures' classes and words.

``LOC_val_solution.csv`` has a line for each validation picture, its name without the ending and what it shows:
``ILSVRC2012_val_00048981,n03995372 85 1 499 272``, the WordNet ID (WNID) before each box. ``LOC_synset_mapping.txt``
has a line for each class: ``n01440764 tench, Tinca tinca``.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from data.ilsvrc import numbered
from data.listing import text
from pipeline.errors import PipelineError

FOLDER: Final = Path("ILSVRC/Data/CLS-LOC")  # here lie train/ and val/
LABELS: Final = "LOC_val_solution.csv"
WORDS: Final = "LOC_synset_mapping.txt"

_LARGEST: Final = 64 << 20  # bytes; the real ones have less than 4 MB
_HEAD: Final = ["ImageId", "PredictionString"]


@dataclass(frozen=True)
class Labels:
    """The WNID of each validation picture by its name without the ending, and the file that says so."""

    path: Path
    wnids: dict[str, str]


def read_labels(path: Path) -> Labels:
    """Read what the validation pictures show from ``LOC_val_solution.csv``.

    Raises
    ------
    PipelineError
        The file cannot be read, is damaged, or is something else.
    """
    lines = csv.reader(io.StringIO(_read(path), newline=""), strict=True)
    wnids: dict[str, str] = {}
    try:
        if next(lines, []) != _HEAD:
            raise PipelineError(f"{path} does not begin with the line {','.join(_HEAD)}; get it again")
        for fields in lines:
            where = f"line {lines.line_num} of {path}"
            if not fields:
                continue
            wnid = fields[1].split()[:1] if len(fields) == len(_HEAD) else []
            if not fields[0] or not wnid:
                raise PipelineError(f"{where} is not a picture's name, a comma and its class's WNID; get it again")
            if fields[0] in wnids:
                raise PipelineError(f"{where} names {fields[0]} a second time; get it again")
            wnids[fields[0]] = wnid[0]
    except csv.Error as error:
        raise PipelineError(f"line {lines.line_num} of {path} is damaged ({error}); get it again") from error
    return Labels(path, wnids)


def val_labels(labels: Labels, folder: Path, names: list[str], train: Path) -> Callable[[bytes], int | str]:
    """What gives a picture in ``folder`` its label, an index into ``names``, or says why it has none.

    ``names`` are the classes of the training pictures in ``train``. A numbered picture without a line, and one of
    another class, raise a PipelineError.
    """
    number = {name: label for label, name in enumerate(names)}

    def label(name: bytes) -> int | str:
        wnid = labels.wnids.get(os.fsdecode(name.rpartition(b".")[0] or name))
        if wnid is None:
            if numbered(name) is None:
                return f"{LABELS} has no line for it"
            raise PipelineError(
                f"{folder} holds {text(name)}, but {labels.path} has no line for it; it is cut short or another "
                "one: get it again"
            )
        if wnid not in number:
            raise PipelineError(
                f"{labels.path} says that {text(name)} in {folder} shows the class {wnid}, of which {train} has none; "
                f"add its training pictures, or get {LABELS} again if there is no such class"
            )
        return number[wnid]

    return label


def read_words(path: Path) -> dict[str, str]:
    """The words of each class, by its WNID, from ``LOC_synset_mapping.txt``.

    Raises
    ------
    PipelineError
        The file cannot be read, is damaged, or is something else.
    """
    words: dict[str, str] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        wnid, _, said = line.strip().partition(" ")
        if not said and line.strip():
            raise PipelineError(f"line {number} of {path} is not a WNID, a space and the class's words; get it again")
        if said:
            words[wnid] = said.strip()
    return words


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise PipelineError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > _LARGEST:
        raise PipelineError(f"{path} has more than {_LARGEST >> 20} MiB and cannot be {path.name}; get it again")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PipelineError(f"{path} is damaged: its byte {error.start + 1} is no text; get it again") from error
