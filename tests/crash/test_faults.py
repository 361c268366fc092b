"""A write that fails, at every place where something is written: told plainly, with what was good left good."""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoint import best_of, checkpoints, find_checkpoint, load_checkpoint
from pipeline.config import load_config
from pipeline.config_values import changes
from pipeline.errors import PipelineError
from pipeline.metrics import MetricsLog
from pipeline.run_dir import RunDir, hash_file, locked, make_folder, read_json, read_sealed, write_sealed
from stages import preprocess
from stages.eval import Evaluation, write_results
from stages.start import State
from stages.train import save as save_state
from tests.command_line import QUICK
from tests.conftest import mounted

CAUSES = (
    (errno.ENOSPC, "the disk is full"),
    (errno.EROFS, "no permission to write"),
    (errno.EACCES, "no permission to write"),
    (errno.EIO, "cannot write"),
)


@contextlib.contextmanager
def failing(folder: Path, number: int, code: int) -> Iterator[list[str]]:
    """Let the ``number``-th call that changes something below ``folder`` fail; yields the calls that were made."""
    calls: list[str] = []
    real_open = builtins.open

    def counted(name: str, call: Callable[..., Any], path_of: Callable[..., object]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            path = str(path_of(*args, **options))
            if path.startswith(str(folder)):
                calls.append(f"{name} {Path(path).name}")
                if len(calls) == number:
                    raise OSError(code, os.strerror(code), path)
            return call(*args, **options)

        return wrapped

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        return (writing if set(mode) & set("wa+") else real_open)(file, mode, *args, **options)

    def handle(number: int, *_: object) -> object:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{number}")
        return ""

    def created(path: Any, *_: object, **__: object) -> object:
        return "" if os.path.isdir(path) else path  # making a folder that is there changes nothing

    writing = counted("open", real_open, lambda file, *_, **__: file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(os, "fsync", counted("fsync", os.fsync, handle))
        patch.setattr(os, "replace", counted("replace", os.replace, lambda old, new: new))
        patch.setattr(os, "mkdir", counted("mkdir", os.mkdir, created))
        yield calls


def every_failure(
    folder: Path, prepare: Callable[[], None], work: Callable[[], None], check: Callable[[], None]
) -> int:
    """Do ``work`` with its 1st, 2nd, 3rd ... changing call failing until it passes; returns how many calls it makes.

    ``prepare`` comes before each attempt, so that the n-th call is always the same one.
    """
    number = 0
    while True:
        number += 1
        code, told = CAUSES[number % len(CAUSES)]
        prepare()
        with failing(folder, number, code) as calls:
            try:
                work()
            except PipelineError as error:
                sentence = str(error)
            else:
                assert len(calls) < number, f"the failure of call {number} ({calls[number - 1]}) went unnoticed"
                every_rename_is_durable(calls)
                return len(calls)
        where = f"call {number} ({calls[number - 1]})"
        assert told in sentence, f"{where}: {sentence}"
        assert str(folder) in sentence, f"{where}: {sentence}"
        assert not list(folder.rglob("*.tmp*")), f"{where} leaves a temporary file"
        check()


def every_rename_is_durable(calls: list[str]) -> None:
    """A kill leaves what was written to the system, a power cut only what was flushed: the order is what counts.

    Before a file gets its name its content is flushed, and right after that the folder.
    """
    for place, call in enumerate(calls):
        what, name = call.split(" ", 1)
        if what != "replace":
            continue
        around = f"{name}: {calls[place - 2 : place + 2]}"
        before, after = calls[place - 1], calls[place + 1]
        assert re.fullmatch(rf"fsync {re.escape(name)}\..*tmp", before), f"not flushed before it is named, {around}"
        assert re.fullmatch(r"fsync [a-z]+", after), f"its folder is not flushed, {around}"


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[RunDir]:
    run = RunDir(tmp_path / "run")
    yield run
    shutil.rmtree(run.root, ignore_errors=True)


def shards_are_sound(run: RunDir, reference: Path) -> None:
    """Shards in place are those of an undisturbed run, and a manifest that is there describes them all."""
    for path in run.preprocess.glob("*.h5"):
        assert path.read_bytes() == (reference / "preprocess" / path.name).read_bytes(), path
    manifest = run.preprocess / "manifest.json"
    if manifest.exists():
        for part in read_sealed(manifest, "")["splits"].values():
            for entry in part["shards"]:
                assert hash_file(run.preprocess / entry["file"]) == entry["sha256"]


def test_every_failing_write_of_preprocessing(quick: RunDir, prepared: Path, small_source: Path) -> None:
    config = changes(settings=list(QUICK))(load_config("seed"))

    def work() -> None:
        with locked(quick):
            preprocess.run(config, quick, source=small_source, jobs=1)

    def prepare() -> None:
        shutil.rmtree(quick.root, ignore_errors=True)

    calls = every_failure(quick.root, prepare, work, lambda: shards_are_sound(quick, prepared))
    assert calls > 40
    shards_are_sound(quick, prepared)
    assert (quick.preprocess / "manifest.json").exists()


def test_disk_that_fills_up_anywhere_while_preprocessing(
    tmp_path: Path, prepared: Path, small_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changes(settings=list(QUICK))(load_config("seed"))
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1 << 40))
    disk = tmp_path / "disk"
    disk.mkdir()
    total = sum(path.stat().st_size for path in (prepared / "preprocess").iterdir())
    failures = 0
    for size in range(64 << 10, 2 * total, 97 << 10):
        with mounted(disk, f"size={size}"):
            run = RunDir(disk / "run")
            try:
                with locked(run):
                    preprocess.run(config, run, source=small_source, jobs=1)
            except PipelineError as error:
                told = str(error)
            else:
                break
            failures += 1
            assert told.startswith(f"the disk is full: cannot write {run.root}/"), told
            assert not list(disk.rglob("*.tmp*"))
            shards_are_sound(run, prepared)
    assert failures > 5
    assert not list(run.root.rglob("*.tmp*"))


def test_every_failing_write_of_saving_a_checkpoint(quick: RunDir) -> None:
    parameters = {"w": np.arange(50, dtype=np.float32)}
    ops = SimpleNamespace(to_host=np.array)

    def save(step: int, top1: float | None) -> None:
        with MetricsLog(make_folder(quick.train) / "metrics.jsonl") as log:
            header = {"config": {}, "validation": None if top1 is None else {"top1": top1}}
            save_state(quick, ops, log, 2, State(step, parameters, parameters), header)  # type: ignore[arg-type]

    def prepare() -> None:
        shutil.rmtree(quick.root, ignore_errors=True)
        for step, top1 in ((1, 0.5), (2, None), (3, None)):
            save(step, top1)

    def check() -> None:
        saved = checkpoints(quick.train)
        assert "step-00000003.ckpt" in [path.name for path in saved]
        assert len(saved) >= 2
        for path in saved:
            assert load_checkpoint(path).arrays["w"].tobytes() == parameters["w"].tobytes()
        for which in ("latest", "best"):
            assert load_checkpoint(find_checkpoint(quick.train, which)).header["step"] in (1, 3, 4)

    calls = every_failure(quick.root, prepare, lambda: save(4, 0.75), check)
    assert calls >= 10
    assert [p.name for p in checkpoints(quick.train)] == ["step-00000003.ckpt", "step-00000004.ckpt"]
    best = best_of(quick.train)
    assert best is not None
    assert best["step"] == 4


def test_every_failing_write_of_an_evaluation(quick: RunDir) -> None:
    def write(loss: float) -> None:
        labels = np.array([0, 1, 1], dtype=np.int32)
        top = np.array([[0, 1], [1, 0], [0, 1]], dtype=np.int32)
        result = Evaluation(labels, top, np.full((3, 2), 0.5, np.float32), np.full(3, loss), 1.0)
        dataset = SimpleNamespace(classes=[{"wnid": "a", "words": None}, {"wnid": "b", "words": None}])
        write_results(make_folder(quick.eval), dataset, result, {"loss": loss})  # type: ignore[arg-type]

    def prepare() -> None:
        shutil.rmtree(quick.root, ignore_errors=True)
        write(1.0)

    def check() -> None:
        # Each file is the old or the new one, whole.
        assert read_json(quick.eval / "metrics.json", "")["loss"] in (1.0, 2.0)
        with np.load(quick.eval / "predictions.npz") as file:
            assert set(file["loss"].tolist()) in ({1.0}, {2.0})
        assert (quick.eval / "per_class.csv").read_text().count("\n") == 3

    calls = every_failure(quick.root, prepare, lambda: write(2.0), check)
    assert calls == 12  # three files: open, fsync, replace, fsync of the folder


def test_every_failing_write_of_the_configuration_and_the_lock(quick: RunDir) -> None:
    def work() -> None:
        with locked(quick):
            write_sealed(quick.config, {"a": 2})

    def prepare() -> None:
        make_folder(quick.root)
        write_sealed(quick.config, {"a": 1})

    every_failure(quick.root, prepare, work, lambda: None)
    assert read_sealed(quick.config, "") == {"a": 2}
