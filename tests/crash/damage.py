"""Damage files at random places; what reads them must refuse with a plain sentence, or find everything as it was.

Cases run in child processes, so that a crash of a library or a hang is noticed and told as well; each child's memory
is limited, so that no damaged number can drive an allocation.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np

from data import ilsvrc, published
from data.dataset import open_dataset
from data.images import UnreadableError, read_square
from data.listing import digest
from data.sources import read_source
from pipeline.checkpoint import find_checkpoint, load_checkpoint, note_best, save_checkpoint
from pipeline.config import load_config
from pipeline.config_values import changes, from_dict, to_dict
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir, read_sealed, write_sealed
from stages import preprocess, verify
from tests import pictures
from tests.command_line import QUICK
from tests.data import archives

BATCH = 100  # cases a child process
SECONDS = 120  # a child that takes longer hangs
PAGE = 4096  # bytes of zeros in place of what was there, as a file system may leave after a crash
MEMORY = 1 << 30  # bytes a child may ask for beyond what it starts with


@dataclass
class Report:
    """How the cases ended, by kind of file."""

    refused: Counter[str] = field(default_factory=Counter)
    harmless: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    other_pixels: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"{self.cases} cases in {self.seconds:.0f} s; none gave a traceback, a crash, a hang or other numbers"]
        for kind in sorted({*self.refused, *self.harmless, *self.rejected, *self.other_pixels}):
            lines.append(
                f"  {kind}: {self.refused[kind]} refused by name, {self.harmless[kind]} harmless, "
                f"{self.rejected[kind]} pictures rejected, {self.other_pixels[kind]} JPEG files decoded otherwise"
            )
        return "\n".join(lines)

    @property
    def cases(self) -> int:
        return sum(counter.total() for counter in (self.refused, self.harmless, self.rejected, self.other_pixels))


@dataclass(frozen=True)
class Subject:
    """A run and a source to damage, and what is read from them while they are sound."""

    run: RunDir
    source: Path
    official: Path
    files: dict[str, list[Path]]  # kind -> files
    sums: dict[str, tuple[int | None, str]]  # of the archives, as data/published.py has them of the real ones
    sound: dict[str, object]


def damage_many(folder: Path, cases: int, seed: int, *, say: Callable[[object], None] | None = print) -> Report:
    """Damage files ``cases`` times.

    Raises
    ------
    AssertionError
        A case ended in another way than the promised ones; the message names it.
    """
    subject = _subject(folder)
    report, start = Report(), time.monotonic()
    for first in range(0, cases, BATCH):
        for line in _in_a_child(
            folder / "results", lambda first=first: _cases(subject, seed, range(first, min(first + BATCH, cases)))
        ):
            number, kind, end = line.split(" ", 2)
            counter = {"refused": report.refused, "harmless": report.harmless, "rejected": report.rejected}
            counter["other pixels"] = report.other_pixels
            assert end in counter, f"case {number} of seed {seed} ({kind}): {end}"
            counter[end][kind] += 1
        report.seconds = time.monotonic() - start
        if say is not None and (first // BATCH) % 10 == 9:
            say(f"{report.cases} of {cases} cases")
    if say is not None:
        say(report)
    return report


def _subject(folder: Path) -> Subject:
    run, source = RunDir(folder / "run"), pictures.draw(folder / "source")
    config = changes(settings=list(QUICK))(load_config("seed"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        preprocess.run(config, run, source=source, jobs=1)
    write_sealed(run.config, to_dict(config))
    arrays = {f"w{i}": np.random.default_rng(i).standard_normal((40, 50), dtype=np.float32) for i in range(3)}
    for step in (1, 2):
        path = save_checkpoint(run.train, step, {"config": to_dict(config)}, arrays)
        note_best(run.train, path, step, 0.5 + 0.1 * step)
    official = _official(folder / "official")
    made = run.preprocess
    files = {
        "shard": sorted(made.glob("*.h5")),
        "checkpoint": sorted(run.train.glob("*.ckpt")),
        "manifest": [made / "manifest.json"],
        "description": [made / name for name in ("classes.json", "color.json", "mean.npy", "rejects.jsonl")],
        "index": [run.train / "latest.json", run.train / "best.json"],
        "config": [run.config],
        "archive": [official / name for name in (ilsvrc.TRAIN, ilsvrc.VAL)],
        "devkit": [official / ilsvrc.DEVKIT],
    }
    sums = {path.name: (None, hashlib.md5(path.read_bytes()).hexdigest()) for path in published.archives_in(official)}
    subject = Subject(run, source, official, files, sums, {})
    subject.sound.update({kind: READS[kind](subject) for kind in files if kind != "archive"})
    subject.sound["archive"] = _archive(subject)
    return subject


def _official(folder: Path) -> Path:
    """Archives with pictures larger than a page: zeros over all of the last one would look like a tar's padding."""
    train = {
        wnid: {f"{wnid}_{i}.JPEG": archives.jpeg(10 * k + i, 120, 90) for i in range(3)}
        for k, wnid in enumerate(archives.IDS)
    }
    val = {f"ILSVRC2012_val_{n:08d}.JPEG": archives.jpeg(100 + n, 120, 90) for n in (1, 2, 3, 4)}
    assert min(len(data) for files in (*train.values(), val) for data in files.values()) > PAGE
    return archives.write_official(folder, train, val, [2, 3, 1, 3])


def _dataset(subject: Subject) -> object:
    """Everything training and evaluation take from a run's shards."""
    dataset = open_dataset(subject.run)
    parts = [dataset.mean.tobytes(), dataset.directions.tobytes(), repr(dataset.classes)]
    for split in (dataset.train, dataset.val):
        parts += [split.labels.tobytes(), b"".join(split.row(i).tobytes() for i in range(len(split)))]
    return parts


def _checkpoint(subject: Subject) -> object:
    loaded = [load_checkpoint(path) for path in subject.files["checkpoint"]]
    return [(c.header, {name: a.tobytes() for name, a in c.arrays.items()}) for c in loaded]


def _index(subject: Subject) -> object:
    return [find_checkpoint(subject.run.train, which) for which in ("latest", "best")]


def _config(subject: Subject) -> object:
    return from_dict(read_sealed(subject.run.config, ""), str(subject.run.config))


def _archive(subject: Subject) -> object:
    """The listing, and of every picture its pixels or why it is rejected."""
    source = read_source(subject.official)
    found: dict[str, object] = {"rejects": source.rejects}
    for name, listing in source.splits.items():
        found[name] = digest(listing)
        for row in range(len(listing)):
            with open(listing.containers[int(listing.container[row])], "rb") as file:
                file.seek(int(listing.offset[row]))
                data = file.read(int(listing.size[row]))
            try:
                found[f"{name}/{row}"] = read_square(data, 32, "bicubic", Counter()).tobytes()
            except UnreadableError as error:
                found[f"{name}/{row}"] = str(error)
    return found


def _devkit(subject: Subject) -> object:
    devkit = ilsvrc.read_devkit(subject.official / ilsvrc.DEVKIT)
    return devkit.ids, devkit.words, devkit.ground_truth.tobytes()


READS: dict[str, Callable[[Subject], object]] = {
    "shard": _dataset,
    "checkpoint": _checkpoint,
    "manifest": _dataset,
    "description": _dataset,
    "index": _index,
    "config": _config,
    "archive": _archive,
    "devkit": _devkit,
}


def _cases(subject: Subject, seed: int, numbers: range) -> object:
    for number in numbers:
        random = np.random.default_rng([seed, number])
        kind = random.choice(list(subject.files), p=[0.3, 0.2, 0.1, 0.1, 0.05, 0.05, 0.15, 0.05])
        path = subject.files[kind][random.integers(len(subject.files[kind]))]
        yield f"{number} {kind} {_case(subject, str(kind), path, random)}"


def _case(subject: Subject, kind: str, path: Path, random: np.random.Generator) -> str:
    """Damage a file, read it, put it right again; returns how it ended."""
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, random))
    try:
        end = _outcome(subject, kind, path)
        # What training does not read (padding, names, sums) is harmless to it; verification tells that too.
        if kind == "shard" or (kind in ("description", "checkpoint", "manifest") and end == "refused"):
            end = _verified(subject, path) or end
        if kind in ("archive", "devkit") and end in ("harmless", "rejected", "other pixels"):
            end = _compared(subject, path) or end
        return end
    finally:
        path.write_bytes(whole)
        (subject.run.preprocess / "damaged.json").unlink(missing_ok=True)


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """A copy with one bit flipped, the tail cut off, a few bytes overwritten or a page of zeros."""
    place, kind = int(random.integers(len(data))) if data else 0, random.uniform()
    if not data:
        return b"\0"
    changed = data
    if 0.5 <= kind < 0.75:
        changed = data[:place]
    elif 0.75 <= kind < 0.9:
        some = random.bytes(int(random.integers(1, 512)))
        changed = data[:place] + some[: len(data) - place] + data[place + len(some) :]
    elif kind >= 0.9:
        changed = data[:place] + bytes(min(PAGE, len(data) - place)) + data[place + PAGE :]
    if changed != data:
        return changed
    # One bit; also where zeros would replace zeros.
    return data[:place] + bytes([data[place] ^ 1 << int(random.integers(8))]) + data[place + 1 :]


def _outcome(subject: Subject, kind: str, path: Path) -> str:
    try:
        found = READS[kind](subject)
    except PipelineError as error:
        sentence = str(error)
        return "refused" if path.name in sentence and "\n" not in sentence else f"told without its name: {sentence}"
    except Exception as error:  # noqa: BLE001  whatever else comes out would be a traceback
        return f"traceback: {type(error).__name__}: {error}"
    sound = subject.sound[kind]
    if found == sound:
        return "harmless"
    if isinstance(found, dict) and isinstance(sound, dict) and found.keys() == sound.keys():
        changed = [value for name, value in found.items() if value != sound[name]]
        # Pixels of a JPEG have no checksum; a picture that cannot be decoded is rejected by name.
        if all(isinstance(value, str) and len(value) < 400 for value in changed):
            return "rejected"
        if all(isinstance(value, bytes) or (isinstance(value, str) and len(value) < 400) for value in changed):
            return "other pixels"
    return "other numbers in silence"


def _verified(subject: Subject, path: Path) -> str | None:
    """Verification must find the same damage; None where it does."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            verify.run(subject.run)
        except PipelineError as error:
            return None if path.name in str(error) else f"verification names another file: {error}"
    return "verification finds nothing"


def _compared(subject: Subject, path: Path) -> str | None:
    """What damage in an archive is only told by its published sum must be told by that; None where it is."""
    try:
        with mock.patch.dict(published.ARCHIVES, subject.sums):
            published.check(path, lambda _: None)
    except PipelineError as error:
        return None if path.name in str(error) else f"--check-archives names another file: {error}"
    return "--check-archives finds nothing"


def _in_a_child(results: Path, work: Callable[[], object]) -> list[str]:
    """Run a generator of lines in a child process; returns the lines, the last telling of a crash or a hang."""
    results.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            with open(results, "w", buffering=1) as file:
                for line in work():  # type: ignore[attr-defined]
                    file.write(f"{line}\n".replace("\\\n", " "))
        except BaseException as error:  # noqa: BLE001
            with open(results, "a") as file:
                file.write(f"? ? the test itself failed: {type(error).__name__}: {error}\n")
        finally:
            os._exit(0)
    end = time.monotonic() + SECONDS
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = -1
            break
        time.sleep(0.01)
    lines = results.read_text().splitlines() if results.exists() else []
    if status:
        what = "hangs" if status == -1 else f"was killed by signal {os.WTERMSIG(status)}"
        lines.append(f"{lines[-1].split()[0] if lines else '?'}+1 ? the reader {what}")
    return lines
