"""What a run's shards were made from, and the command line that makes them again."""

from __future__ import annotations

import shlex
from pathlib import Path

from pipeline.checkpoint import checkpoints
from pipeline.metrics import read_metrics
from pipeline.run_dir import RunDir


def made_from(run: RunDir) -> str | None:
    """The source that a run's shards were made from, as it was named; None for its own demo set, or if none is noted.

    A run that is moved takes its demo set along, and what is noted is where that was before.
    """
    noted = [r["source"] for r in read_metrics(run.preprocess / "metrics.jsonl") if isinstance(r.get("source"), str)]
    if not noted:
        return None
    source, demo = Path(noted[-1]), run.root / "demo"
    moved = source.name == demo.name and demo.is_dir() and not source.exists()
    return None if moved or source.absolute() == demo.absolute() else noted[-1]


def remedy(run: RunDir) -> str:
    """What mends shards that are not usable: the end of a sentence."""
    return f"run {preprocess_command(run)}"


def preprocess_command(run: RunDir) -> str:
    """The command line that makes a run's shards, or makes them again."""
    source = made_from(run)
    named = "" if source is None else f" --source {shlex.quote(source)}"
    known = (run.preprocess / "metrics.jsonl").exists() or (run.root / "demo").exists()
    if checkpoints(run.train) and not known:  # as after an import: the demo set is not what these weights are for
        named = " --source DIR"
    return f"python run_pipeline.py --stage preprocess {run.flag}{named}"
