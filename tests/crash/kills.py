"""Kill the pipeline at random moments; started again it must end as if nothing had happened.

A run is made once without disturbance. Then victims go through the same stages, each killed with SIGKILL at moments
drawn uniformly over the stage's working time, started again with the same command, killed again, until they reach the
end. At every kill whatever bears its final name must be complete and readable. At the end all files must have the
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
LONG = ({"train": (24,) * 5, "val": (8,) * 5}, 200, 420)
SHORT = ({"train": (8,) * 5, "val": (3,) * 5}, 200, 420)


@dataclass
class Report:
    """What was done: kills by stage, how many of them left a half-written file, how many victims reached the end."""

    kills: Counter[str] = field(default_factory=Counter)
    half_written: Counter[str] = field(default_factory=Counter)
    victims: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        by_stage = ", ".join(
            f"{self.kills[s]} in {s} ({self.half_written[s]} left a half-written file)" for s in STAGES
        )
        return (
            f"{self.kills.total()} kills: {by_stage}; {self.victims} runs were finished after them, each identical to "
            f"the undisturbed one, in {self.seconds:.0f} s"
        )


def kill_many(folder: Path, kills: int, seed: int, *, long: bool = True, say: object = print) -> Report:
    """Kill until ``kills`` have happened and the last victim has reached its end.

    Raises
    ------
    AssertionError
        A promise was broken; the message says which, the run is left in ``folder``.
    """
    random, report, start = np.random.default_rng(seed), Report(), time.monotonic()
    source = pictures.draw(folder / "source", *(LONG if long else SHORT))
    whole = folder / "undisturbed"
    lasts = {stage: _undisturbed(stage, whole, source) for stage in STAGES}
    expected = {stage: _state(stage, whole) for stage in STAGES}
    while report.kills.total() < kills:
        victim = folder / f"victim-{report.victims}"
        # The short form spreads its few kills; the long form kills each stage a few times a victim.
        wanted = {stage: int(random.integers(1, 5)) if long else 1 + (stage == "train") for stage in STAGES}
        for stage in STAGES:
            for _ in range(min(wanted[stage], kills - report.kills.total())):
                moment = random.uniform(0, lasts[stage])
                if _killed(stage, victim, source, moment, whole_group=bool(random.integers(2)), report=report):
                    _check_what_is_there(victim)
            _run(stage, victim, source)
            assert _state(stage, victim) == expected[stage], f"{victim}: {stage} ended otherwise than undisturbed"
            _no_process_left(victim)
        left = [str(path) for path in victim.rglob("*.tmp*")]
        assert not left, f"temporary files are left for good: {left}"
        shutil.rmtree(victim)
        report.victims += 1
        report.seconds = time.monotonic() - start
        if callable(say):
            say(report)
    return report


def _arguments(stage: str, run: Path, source: Path) -> list[str]:
    common = ["--stage", stage, "--run", str(run)]
    if stage == "preprocess":
        changes = (
            *("preprocess.size=72", "preprocess.shard_images=8", "input.crop=67", "input.border=[0,0]"),
            *("train.epochs=1", "train.batch_size=8", "train.log_every=1", "train.checkpoint_every=2"),
            "eval.batch_size=4",
        )
        return [*common, "--source", str(source), "--jobs", "2", *settings(*changes)]
    return [*common, "--resume"] if stage == "train" else [*common, "--views", "10"]


def _start(stage: str, run: Path, source: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "run_pipeline.py", *_arguments(stage, run, source)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _begun(process: subprocess.Popen[str], stage: str) -> bool:
    """Wait for the stage's work to begin; False where the process ended before."""
    assert process.stdout is not None
    return any(line.startswith(BEGINS[stage]) for line in process.stdout)


def _undisturbed(stage: str, run: Path, source: Path) -> float:
    """Run a stage to its end; returns how many seconds its work took."""
    process = _start(stage, run, source)
    _begun(process, stage)
    start = time.monotonic()
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return time.monotonic() - start


def _run(stage: str, run: Path, source: Path) -> None:
    process = _start(stage, run, source)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, f"started again, {stage} failed: {out}{err}"


def _killed(stage: str, run: Path, source: Path, moment: float, *, whole_group: bool, report: Report) -> bool:
    """Kill a stage ``moment`` seconds into its work; False where it ended before."""
    process = _start(stage, run, source)
    if _begun(process, stage):
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            half = any(run.rglob("*.tmp*"))
            # Half the time the workers outlive their parent, as they do where the system kills one big process.
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
            report.kills[stage] += 1
            report.half_written[stage] += half
    out, err = process.communicate()
    if process.returncode == -signal.SIGKILL:
        return True
    assert process.returncode == 0, f"started again, {stage} failed: {out}{err}"
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
