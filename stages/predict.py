"""Prediction: the five most probable classes of one's own pictures.

Pictures go the way of the shards (``data.images``): decoded to RGB, short side to 256, centre square, and from that
the views of the evaluation. Only that they are always turned as their EXIF data say: those of a phone often lie on
their side.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np
from PIL import Image

from data.images import UnreadableError, read_square
from data.listing import LARGEST_FILE
from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir
from pipeline.streams import can_show
from stages.eval import most_probable
from stages.trained import Predict, Trained, load_trained

STDIN: Final = "-"
_CROPS: Final = 40  # computed at a time
_NO_PICTURES: Final = frozenset(("BUFR", "GRIB", "HDF5", "MPEG", "PDF"))  # which Pillow knows by name, not by pixels
_REFUSED: Final = _NO_PICTURES | {"EPS", "WMF"}  # the former Pillow hands to Ghostscript, which runs programs


@dataclass(frozen=True)
class Answer:
    """What came of one picture: its most probable classes with their probabilities, or why it could not be read."""

    name: str
    top: list[tuple[int, float]]
    error: str | None = None


def run(
    run_dir: RunDir, ops: ModuleType, *, files: Sequence[str], checkpoint: str, views: int | None, as_json: bool
) -> None:
    """Print the top-5 of each picture on standard output.

    Parameters
    ----------
    files : names of pictures and folders (searched with their subfolders); ``-`` is standard input
    views : 1, 10 or None for what the checkpoint's settings say, as in evaluation
    as_json : one JSON object a line instead of bars

    Raises
    ------
    PipelineError
        No usable checkpoint; or, after all others have been shown, some pictures or folders could not be read.
    """
    trained = load_trained(run_dir, checkpoint)
    views = views or trained.config.eval.views
    show = _json_line if as_json else _bars
    total = failed = 0
    folders: list[str] = []

    def unreadable(error: OSError) -> None:
        folders.append(str(error.filename))
        show(Answer(folders[-1], [], error.strerror or str(error)), trained)

    for answer in predict(trained, ops, _expand(files, unreadable), views):
        total += 1
        failed += answer.error is not None
        show(answer, trained)
    lost = [f"{failed} of {total} pictures"] if failed else []
    lost += [f"{len(folders)} folder{'s' if len(folders) > 1 else ''}"] if folders else []
    if lost:
        raise PipelineError(f"{' and '.join(lost)} could not be read; the reasons are above")
    if not total:
        raise PipelineError(f"there is no picture in {', '.join(files)}")


def predict(trained: Trained, ops: ModuleType, names: Iterator[str], views: int) -> Iterator[Answer]:
    """The answers for pictures, in their order; some at a time go through the network."""
    network = trained.predictor(ops, views)
    while chunk := list(islice(names, max(1, _CROPS // views))):
        read = [_read(name, trained.config) for name in chunk]
        squares = [square for square in read if not isinstance(square, str)]
        rows = iter(_probabilities(network, ops, trained.inputs(squares, views)) if squares else ())
        for name, square in zip(chunk, read, strict=True):
            if isinstance(square, str):
                yield Answer(name, [], square)
                continue
            p = next(rows)
            top = most_probable(p[np.newaxis])[0].tolist()
            yield Answer(name, [(number, float(p[number])) for number in top])


def _probabilities(network: Predict, ops: ModuleType, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """float32 (pictures, classes), averaged over the views."""
    p = ops.to_host(network(ops.upload(inputs)))
    if not np.all(np.isfinite(p)):
        raise PipelineError("the network's output is not finite; this checkpoint cannot be used")
    return p


def _read(name: str, config: Config) -> np.ndarray | str:
    """A picture's square as preprocessing would store it, uint8 (size, size, 3), or why there is none."""
    how = config.preprocess
    try:
        return read_square(_contents(name), how.size, how.filter, Counter(), formats=_formats(), upright=True)
    except (UnreadableError, OSError) as error:
        return getattr(error, "strerror", None) or str(error)


def _contents(name: str) -> bytes:
    if name == STDIN:
        data = sys.stdin.buffer.read(LARGEST_FILE + 1)
    else:
        with open(name, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise UnreadableError(f"it is larger than {LARGEST_FILE >> 20} MiB")
    return data


def _formats() -> tuple[str, ...]:
    """All that Pillow reads by itself."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - _REFUSED))


def _expand(files: Sequence[str], unreadable: Callable[[OSError], None]) -> Iterator[str]:
    """Files as named; of folders the files below them that have a picture's name, sorted.

    ``unreadable`` is called with the error of each folder that cannot be read.
    """
    for name in files:
        if name == STDIN or not os.path.isdir(name):  # where that cannot be told, opening it says why
            yield name
            continue
        folder = Path(name)
        Image.init()
        suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind not in _NO_PICTURES}
        below = (Path(place, file) for place, _, names in os.walk(folder, onerror=unreadable) for file in names)
        inside = sorted(path for path in below if not path.name.startswith(".") and _is_file(path))
        pictures = [path for path in inside if path.suffix.lower() in suffixes]
        yield from map(str, pictures)
        if len(pictures) < len(inside):
            others = len(inside) - len(pictures)
            print(
                f"{folder}: {others} of {len(inside)} files are no pictures by their names; left out", file=sys.stderr
            )


def _is_file(path: Path) -> bool:
    """Whether opening it gives a file's bytes, or the reason why not; a pipe would be waited for."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def _json_line(answer: Answer, trained: Trained) -> None:
    if answer.error is not None:
        print(json.dumps({"file": answer.name, "error": answer.error}), flush=True)
        return
    top = [
        {
            "class": number,
            "wnid": trained.classes[number].get("wnid") or "",
            "words": trained.classes[number].get("words") or "",
            "probability": round(probability, 6),
        }
        for number, probability in answer.top
    ]
    print(json.dumps({"file": answer.name, "top": top}), flush=True)


def _bars(answer: Answer, trained: Trained) -> None:
    """The picture's name, and below it a line a class: probability, bar, name."""
    title = "standard input" if answer.name == STDIN else _printable(answer.name)
    if answer.error is not None:
        print(f"{title}: {answer.error}", file=sys.stderr, flush=True)
        return
    width = max(40, min(shutil.get_terminal_size().columns, 100))
    names = [trained.label(number) for number, _ in answer.top]
    name_width = min(max(map(_columns, names)), width // 2)
    bar_width = width - name_width - 12
    print(title)
    for name, (_, probability) in zip(names, answer.top, strict=True):
        short = _printable(name)
        if _columns(short) > name_width:
            while _columns(short) > name_width - 2:
                short = short[:-1]
            short += ".."
        space = " " * (name_width - _columns(short))
        print(f"  {short}{space}  {probability:6.1%}  {bar(probability, bar_width)}".rstrip())
    print(flush=True)


def _columns(text: str) -> int:
    """How many columns a terminal gives to a text: two for a Chinese sign, none for an accent on its own."""
    wide = sum(unicodedata.east_asian_width(sign) in "WF" for sign in text)
    return len(text) + wide - sum(unicodedata.combining(sign) > 0 for sign in text)


def _printable(text: str) -> str:
    """The text with what the terminal cannot show, or would obey, replaced; file names may hold any bytes."""
    encoding = sys.stdout.encoding or "ascii"
    shown = "".join(sign if sign.isprintable() else "?" for sign in text)
    return shown.encode(encoding, errors="replace").decode(encoding)


def bar(share: float, width: int) -> str:
    """``share`` of ``width`` columns filled, to an eighth of a column where the terminal can show it."""
    if not can_show("█▏"):
        return "#" * round(share * width)
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
