"""Metrics as JSON lines: one line a record, readable while the run goes on, cut back when a run is taken up again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.run_dir import make_folder, write_bytes, write_error

Record = dict[str, Any]


class MetricsLog:
    """Append records to a JSONL file. Use as a context manager; ``mirror`` is given each record as well."""

    def __init__(self, path: Path, mirror: Callable[[Record], None] | None = None) -> None:
        self._path, self._mirror = path, mirror
        make_folder(path.parent)
        try:
            # Unbuffered: closing after a failed write must not try to write the rest once more.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed in __exit__
        except OSError as error:
            raise write_error(path, error) from error

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, record: Record) -> None:
        rest = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise write_error(self._path, error) from error
        if self._mirror is not None:
            self._mirror(record)

    def sync(self) -> None:
        """Make all lines so far durable; called before a checkpoint that later lines build on."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise write_error(self._path, error) from error


def has_numbers(record: Record, *names: str) -> bool:
    """Whether a line of metrics has a number under each of these names."""
    return all(isinstance(record.get(name), int | float) for name in names)


def read_metrics(path: Path) -> list[Record]:
    """All complete records; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def training_lines(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """The lines of steps, and those of validations, that training wrote; one that lacks a number is left out."""
    steps = [r for r in records if has_numbers(r, "step", "loss", "lr", "images_per_second", "data_wait")]
    validations = [r for r in records if has_numbers(r, "step", "top1", "top5", "validation_loss")]
    return steps, validations


def cut_back(path: Path, step: int) -> None:
    """Drop the records after ``step``: the run goes on from there and will write them again.

    A file with nothing to drop keeps its time, which tells ``--stage watch`` when the last line came.
    """
    kept = [r for r in read_metrics(path) if isinstance(r.get("step"), int) and r["step"] <= step]
    content = "".join(json.dumps(record) + "\n" for record in kept).encode()
    if path.exists() and path.read_bytes() == content:
        return
    make_folder(path.parent)
    write_bytes(path, content)
