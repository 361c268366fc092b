"""Kill the pipeline at random moments; started again it must end as if nothing had happened.

A run is made once without disturbance. Then victims go through the same stages: each stage is killed with SIGKILL,
started again with the same command, killed again, until it ends before the next kill. Half of the kills come at a
random moment of the stage's work, where most of the time goes; the other half at a random change of the run directory
(see site/sitecustomize.py), where the narrow places are. The short form kills at named places instead and depends on
no clock. At every kill whatever bears its final name must be complete and readable. At the end all files must have the
bytes of the undisturbed run (metrics lines but for times), and no temporary file and no process may be left.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.checkpoint import best_of, checkpoints, find_checkpoint, load_checkpoint
from pipeline.metrics import read_metrics
from pipeline.run_dir import read_sealed
from tests import pictures
from tests.command_line import ROOT, settings

STAGES = ("preprocess", "train", "eval")
# What a stage prints before its work begins; kills are drawn from then on. Imports before it write nothing.
BEGINS = {"preprocess": "preprocess: the shards need", "train": "train ", "eval": "computing on"}
TIMES = ("images_per_second", "data_wait", "seconds")
SHARE = 0.5  # kills are drawn over so much of a stage's work, so that each stage is killed several times
LONG = ({"train": (16,) * 5, "val": (8,) * 5}, 200, 420)
SHORT = ({"train": (4,) * 5, "val": (2,) * 5}, 80, 120)
SITE = Path(__file__).resolve().parent / "site"


@dataclass
class Report:
    """What was done: kills by stage, how many of them left a half-written file, how many victims reached the end."""

    kills: Counter[str] = field(default_factory=Counter)
    at_a_change: Counter[str] = field(default_factory=Counter)
    half_written: Counter[str] = field(default_factory=Counter)
    victims: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        by_stage = ", ".join(
            f"{self.kills[s]} in {s} ({self.at_a_change[s]} at a change of the run directory, "
            f"{self.half_written[s]} left an unfinished file)"
            for s in STAGES
            if self.kills[s]
        )
        return (
            f"{self.kills.total()} kills: {by_stage}; {self.victims} runs were finished after them, each identical to "
            f"the undisturbed one, in {self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class Whole:
    """A stage that nothing disturbed: seconds its work took, changes it made to the run directory, what it left."""

    seconds: float
    changes: int
    state: dict[str, object]


@dataclass(frozen=True)
class Kill:
    """When to kill: so many seconds into the work (float), at the n-th change (int), or as a file is opened (str)."""

    at: float | int | str
    whole_group: bool  # or the parent alone: its workers outlive it, as where the system kills one big process


# Some shards in place; a checkpoint in place that no index names; the next one begun, its metrics lines written; the
# last one in place, the one before it not yet removed; one of three files of the evaluation in place.
PLACES = {
    "preprocess": (Kill("classes.json.tmp", False),),
    "train": (Kill("latest.json.tmp", True), Kill("step-00000003.ckpt.tmp", False), Kill("best.json.tmp", True)),
    "eval": (Kill("per_class.csv.tmp", True),),
}


def kill_many(
    folder: Path, kills: int, seed: int, stages: Sequence[str] = STAGES, *, say: Callable[[object], None] = print
) -> Report:
    """Kill at random moments until ``kills`` have happened and the last victim has reached its end.

    ``stages`` are those to kill, in the pipeline's order and without a gap: victims begin as copies of what the
    undisturbed run had before the first of them, and end with the last.

    Raises
    ------
    AssertionError
        A promise was broken; the message says which, the run is left in ``folder``.
    """
    random, report, start = np.random.default_rng(seed), Report(), time.monotonic()
    source, wholes = _wholes(folder, LONG, stages)

    def draw(stage: str) -> Iterator[Kill]:
        # At most so many a stage: an evaluation begins anew each time and would take all of them.
        for _ in range(min(int(random.integers(2, 7)), kills - report.kills.total())):
            at: float | int = random.uniform(0, SHARE * wholes[stage].seconds)
            if random.integers(2):
                at = int(random.integers(max(12, SHARE * wholes[stage].changes))) + 1
            yield Kill(at, bool(random.integers(2)))

    while report.kills.total() < kills:
        victim = folder / f"victim-{report.victims}"
        if (folder / "before").exists():
            shutil.copytree(folder / "before", victim)
        _end_alike(victim, source, {stage: draw(stage) for stage in stages}, wholes, report)
        report.seconds = time.monotonic() - start
        say(report)
    return report


def kill_at_places(folder: Path) -> Report:
    """The short form: one victim, killed at :data:`PLACES`; raises as :func:`kill_many` does."""
    report = Report()
    source, wholes = _wholes(folder, SHORT, STAGES)
    _end_alike(folder / "victim", source, {stage: iter(kills) for stage, kills in PLACES.items()}, wholes, report)
    return report


def _wholes(
    folder: Path, size: tuple[dict[str, tuple[int, ...]], int, int], stages: Sequence[str]
) -> tuple[Path, dict[str, Whole]]:
    """The source, and each of ``stages`` undisturbed; what stood there before the first of them is in ``before``."""
    source, run = pictures.draw(folder / "source", *size), folder / "undisturbed"
    if size is LONG:  # whose kills are drawn from the seconds of work, in which no compiling must count
        for stage in STAGES[: STAGES.index(stages[-1]) + 1]:
            _undisturbed(stage, folder / "compiling", source)
        shutil.rmtree(folder / "compiling")
    for stage in STAGES[: STAGES.index(stages[0])]:
        _undisturbed(stage, run, source)
    if run.exists():
        shutil.copytree(run, folder / "before")
    return source, {stage: _undisturbed(stage, run, source) for stage in stages}


def _end_alike(
    victim: Path, source: Path, planned: dict[str, Iterator[Kill]], wholes: dict[str, Whole], report: Report
) -> None:
    """Take a run through all stages, killed as planned; it must end as the whole ones did."""
    for stage, kills in planned.items():
        ended = False
        while not ended:
            kill = next(kills, None)
            ended = _ends_before(stage, victim, source, kill, report)
            _check_what_is_there(victim)
        assert _state(stage, victim) == wholes[stage].state, f"{victim}: {stage} ended otherwise than undisturbed"
        _no_process_left(victim)
    left = [str(path) for path in victim.rglob("*.tmp*")]
    assert not left, f"temporary files are left for good: {left}"
    shutil.rmtree(victim)
    report.victims += 1


def _arguments(stage: str, run: Path, source: Path) -> list[str]:
    common = ["--stage", stage, "--run", str(run)]
    if stage == "preprocess":
        changes = (
            *(
                "preprocess.size=72",
                "preprocess.shard_images=8",
                "input.crop=67",
                "input.border=[0,0]",
                "network.fc_units=250",
            ),
            *("train.epochs=1", "train.batch_size=8", "train.log_every=1", "train.checkpoint_every=2"),
            *("train.keep_checkpoints=1", "eval.batch_size=4"),
        )
        return [*common, "--source", str(source), "--jobs", "2", *settings(*changes)]
    return [*common, "--resume"] if stage == "train" else [*common, "--views", "10"]


def _start(stage: str, run: Path, source: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "run_pipeline.py", *_arguments(stage, run, source)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(SITE), "CRASH_BELOW": str(run), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _begun(process: subprocess.Popen[str], stage: str) -> bool:
    """Wait for the stage's work to begin; False where the process ended before."""
    assert process.stdout is not None
    return any(line.startswith(BEGINS[stage]) for line in process.stdout)


def _undisturbed(stage: str, run: Path, source: Path) -> Whole:
    """Run a stage to its end."""
    count = run.with_name("changes")
    process = _start(stage, run, source, CRASH_COUNT=str(count))
    _begun(process, stage)
    start = time.monotonic()
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return Whole(time.monotonic() - start, int(count.read_text()), _state(stage, run))


def _ends_before(stage: str, run: Path, source: Path, kill: Kill | None, report: Report) -> bool:
    """Start a stage and kill it as told; whether it came to its end before that."""
    if kill is not None and not isinstance(kill.at, float):
        process = _start(stage, run, source, CRASH_AT=str(kill.at), CRASH_GROUP=str(int(kill.whole_group)))
    else:
        process = _start(stage, run, source)
        if kill is not None and _begun(process, stage):
            try:
                process.wait(kill.at)
            except subprocess.TimeoutExpired:
                (os.killpg if kill.whole_group else os.kill)(process.pid, signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    if kill is None or process.returncode != -signal.SIGKILL:
        assert process.returncode == 0, f"started again, {stage} failed: {out}{err}"
        return True
    report.kills[stage] += 1
    report.at_a_change[stage] += not isinstance(kill.at, float)
    report.half_written[stage] += any(run.rglob("*.tmp*"))
    return False


def _check_what_is_there(run: Path) -> None:
    """Every file that bears its final name is complete."""
    for path in checkpoints(run / "train"):
        load_checkpoint(path)
    for which in ("latest", "best"):
        if (run / "train" / f"{which}.json").exists() and checkpoints(run / "train"):
            load_checkpoint(find_checkpoint(run / "train", which))
    if (run / "config.json").exists():
        read_sealed(run / "config.json", "")
    manifest = run / "preprocess" / "manifest.json"
    if manifest.exists():
        for split in read_sealed(manifest, "")["splits"].values():
            for entry in split["shards"]:
                assert _digest(run / "preprocess" / entry["file"]) == entry["sha256"], entry
    metrics = run / "eval" / "metrics.json"
    if metrics.exists():
        json.loads(metrics.read_text())


def _state(stage: str, run: Path) -> dict[str, object]:
    """What a stage has made: hashes of files, and metrics but for times."""
    if stage == "preprocess":
        names = [p for p in sorted((run / stage).iterdir()) if p.name != "metrics.jsonl"]
        return {path.name: _digest(path) for path in [*names, run / "config.json"]}
    if stage == "train":
        records = [_timeless(record) for record in read_metrics(run / "train" / "metrics.jsonl")]
        hashes = {path.name: _digest(path) for path in checkpoints(run / "train")}
        # The run that was never stopped has pruned the same checkpoints.
        return {
            **hashes,
            "metrics": records,
            "best": best_of(run / "train"),
            "latest": _digest(run / "train" / "latest.json"),
        }
    hashes = {name: _digest(run / "eval" / name) for name in ("per_class.csv",)}
    with np.load(run / "eval" / "predictions.npz", allow_pickle=False) as file:
        hashes |= {name: hashlib.sha256(file[name].tobytes()).hexdigest() for name in file.files}
    return {**hashes, "metrics": _timeless(json.loads((run / "eval" / "metrics.json").read_text()))}


def _timeless(record: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in record.items() if key not in TIMES}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _no_process_left(run: Path) -> None:
    """No worker of a killed parent lives on; each is given ten seconds to notice."""
    end = time.monotonic() + 10
    while left := _processes(run):
        assert time.monotonic() < end, f"processes {left} still work on {run}"
        time.sleep(0.05)


def _processes(run: Path) -> list[int]:
    """Processes with an open file below ``run``, but for this one."""
    found = []
    for home in Path("/proc").glob("[0-9]*"):
        if int(home.name) == os.getpid():
            continue
        try:
            links = [os.readlink(handle) for handle in (home / "fd").iterdir()]
        except OSError:
            continue
        if any(link.startswith(f"{run}/") for link in links):
            found.append(int(home.name))
    return found
