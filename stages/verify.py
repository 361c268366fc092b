"""Verification: every shard, checkpoint, manifest and index of a run against its checksum.

Nothing is repaired here. What is damaged is named, together with the command that mends it; the names of damaged
shards are noted in the run, so that ``--stage preprocess`` makes exactly those again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.listing import SPLITS
from data.manifest import is_manifest, note_damage
from data.origin import preprocess_command
from pipeline.checkpoint import best_of, checkpoints, find_checkpoint, load_checkpoint
from pipeline.config_values import from_dict
from pipeline.errors import PipelineError
from pipeline.progress import MB, Megabytes, Progress, megabytes
from pipeline.run_dir import RunDir, hash_file, read_sealed
from pipeline.settings import remedy_of_config


@dataclass(frozen=True)
class _Item:
    """A file to check: ``check`` returns what is wrong with it, None for nothing, and counts the bytes it has read."""

    path: Path
    bytes: int
    check: Callable[[Callable[[int], None]], str | None]


def run(run_dir: RunDir) -> None:
    """Check a run's files.

    Raises
    ------
    PipelineError
        Something is damaged, or there is nothing to check.
    """
    start = time.perf_counter()
    indexes, manifest = _indexes(run_dir)
    made = [] if manifest is None else _preprocessed(run_dir.preprocess, manifest)
    saved = [_Item(path, path.stat().st_size, partial(_checkpoint, path)) for path in checkpoints(run_dir.train)]
    if not (indexes or made or saved):
        raise PipelineError(f"there is nothing to verify in {run_dir.root}; name a run with --run")
    total = sum(item.bytes for item in made + saved)
    with Progress("verify", megabytes(total), "MB") as progress:
        counter = Megabytes(progress)
        wrong = {path: text for path, text in indexes.items() if text is not None}
        wrong |= _checked_in_threads(made, counter)
        # One after another: each is read into memory as a whole.
        for item in saved:
            text = item.check(counter.add)
            if text is not None:
                wrong[item.path] = text
    files = len(indexes) + len(made) + len(saved)
    seconds = time.perf_counter() - start
    for path, text in wrong.items():
        print(f"damaged: {path}: {text}")
    if wrong:
        shards = [item.path.name for item in made if item.path in wrong]
        if shards and os.access(run_dir.preprocess, os.W_OK):
            note_damage(run_dir.preprocess, shards)
        damaged = ", ".join(str(path) for path in wrong)
        raise PipelineError(f"{len(wrong)} of {files} files are damaged ({damaged}); {_remedy(run_dir, wrong)}")
    print(
        f"verify: all {files} files of {run_dir.root} are sound "
        f"({total / MB:.0f} MB, {total / MB / max(seconds, 1e-9):.0f} MB/s)"
    )


def _indexes(run_dir: RunDir) -> tuple[dict[Path, str | None], dict[str, Any] | None]:
    """The small sealed files that are there, each with what is wrong with it; and the manifest if it is sound."""
    manifest: dict[str, Any] = {}

    def read_manifest() -> None:
        value = read_sealed(run_dir.preprocess / "manifest.json", "")
        if not is_manifest(value):
            raise PipelineError("it is from another version of this program")
        manifest.update(value)

    def read_best() -> None:
        if best_of(run_dir.train):  # its sentence says what to do about this file
            _existing(find_checkpoint(run_dir.train, "best"))

    reads: dict[Path, Callable[[], object]] = {
        run_dir.config: lambda: from_dict(read_sealed(run_dir.config, ""), str(run_dir.config)),
        run_dir.preprocess / "manifest.json": read_manifest,
        run_dir.train / "latest.json": lambda: _existing(find_checkpoint(run_dir.train, "latest")),
        run_dir.train / "best.json": read_best,
    }
    found: dict[Path, str | None] = {}
    for path, read in reads.items():
        if not path.exists():
            continue
        try:
            read()
        except PipelineError as error:
            found[path] = str(error).rstrip("; ")  # no remedy was given: all of them come at the end
        else:
            found[path] = None
    if run_dir.preprocess.exists() and not (run_dir.preprocess / "manifest.json").exists():
        print(f"verify: {run_dir.preprocess} is not finished; its shards are checked when --stage preprocess goes on")
    return found, manifest or None


def _existing(path: Path) -> None:
    if not path.is_file():
        raise PipelineError(f"it names {path}, which does not exist")


def _preprocessed(folder: Path, manifest: dict[str, Any]) -> list[_Item]:
    """Shards and the files that describe them."""
    hashes = dict(manifest["files"])
    sizes = {}
    for split in SPLITS:
        for entry in manifest["splits"][split]["shards"]:
            hashes[entry["file"]], sizes[entry["file"]] = entry["sha256"], entry["bytes"]
    items = []
    for name, expected in hashes.items():
        path = folder / name
        size = sizes[name] if name in sizes else (path.stat().st_size if path.is_file() else 0)
        items.append(_Item(path, size, partial(_file, path, expected)))
    return items


def _file(path: Path, expected: str, count: Callable[[int], None]) -> str | None:
    try:
        sound = hash_file(path, count) == expected
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None if sound else "it is not the file that was written"


def _checkpoint(path: Path, count: Callable[[int], None]) -> str | None:
    try:
        load_checkpoint(path, "remove it")
    except PipelineError as error:
        return str(error)
    finally:
        count(path.stat().st_size)
    return None


def _checked_in_threads(items: list[_Item], counter: Megabytes) -> dict[Path, str]:
    """What is wrong with each item. Hashing lets go of Python's lock, so threads keep a fast disk busy."""
    pool = ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8))
    try:
        results = pool.map(lambda item: item.check(counter.add), items)
        return {item.path: text for item, text in zip(items, results, strict=True) if text is not None}
    finally:
        pool.shutdown(cancel_futures=True)


def _remedy(run_dir: RunDir, wrong: dict[Path, str]) -> str:
    """What mends all that is wrong, in one sentence."""
    remedies = []
    if any(path.parent == run_dir.preprocess for path in wrong):
        remedies.append(f"make again what is damaged there, and nothing else, with: {preprocess_command(run_dir)}")
    if any(path.suffix == ".ckpt" for path in wrong):
        remedies.append("remove the damaged checkpoints; --stage train --resume goes on from the newest that is sound")
    if run_dir.train / "latest.json" in wrong or run_dir.train / "best.json" in wrong:
        remedies.append("remove the damaged index in train/; --stage train --resume writes it anew")
    if run_dir.config in wrong:
        remedies.append(remedy_of_config(run_dir))
    return "; ".join(remedies)
