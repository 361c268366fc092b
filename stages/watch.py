"""Watching a run in progress from another terminal: last metrics, remaining time, and the loss as a curve."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from data.manifest import read_manifest
from data.sampling import steps_per_epoch
from pipeline.config import Config
from pipeline.config_values import from_dict
from pipeline.errors import PipelineError
from pipeline.metrics import Record, read_metrics, training_lines
from pipeline.progress import duration
from pipeline.run_dir import RunDir, read_sealed
from pipeline.settings import remedy_of_config
from pipeline.streams import can_show

SECONDS: Final = 2.0  # between two looks
_RATES: Final = 10  # last logged lines whose median speed tells the remaining time
_CLEAR: Final = "\x1b[H\x1b[J"


def run(run_dir: RunDir) -> None:
    """Show the run's state; on a terminal again and again until Ctrl-C, elsewhere once.

    Raises
    ------
    PipelineError
        The run has not been preprocessed, or never trained.
    """
    start = f"start it: python run_pipeline.py --stage train --resume {run_dir.flag}"
    settings = _settings(run_dir, start)
    path = run_dir.train / "metrics.jsonl"
    if not path.exists():
        raise PipelineError(f"{path} does not exist: nothing has been trained; {start}")
    if not sys.stdout.isatty():
        print(_look(run_dir, settings, 80, 24))
        return
    try:
        while True:
            size = shutil.get_terminal_size()
            text = _look(run_dir, settings, size.columns, size.lines)
            print(f"{_CLEAR}{text}\nCtrl-C ends the view, not the run", end="", flush=True)
            time.sleep(SECONDS)
            # --restart may begin with another recipe; what cannot be read meanwhile was good a moment ago.
            with contextlib.suppress(PipelineError):
                settings = _settings(run_dir, start)
    except KeyboardInterrupt:
        print()


def _settings(run_dir: RunDir, start: str) -> tuple[Config, int, int]:
    """What the run trains with, its steps an epoch, and how many classes its pictures have."""
    remedy = remedy_of_config(run_dir) if run_dir.config.exists() else start
    config = from_dict(read_sealed(run_dir.config, remedy), str(run_dir.config))
    manifest = read_manifest(run_dir)
    per_epoch = steps_per_epoch(manifest["splits"]["train"]["images"], config.train.batch_size)
    return config, per_epoch, manifest["classes"]


def _look(run_dir: RunDir, settings: tuple[Config, int, int], width: int, height: int) -> str:
    path = run_dir.train / "metrics.jsonl"
    try:
        written, records = path.stat().st_mtime, read_metrics(path)
    except FileNotFoundError:  # --restart has moved it aside and not begun yet
        written, records = time.time(), []
    return screen(run_dir.root, *settings, records, written, width, height)


def screen(
    root: Path,
    config: Config,
    per_epoch: int,
    classes: int,
    records: Sequence[Record],
    written: float,
    width: int,
    height: int,
) -> str:
    """What is shown of a run: some lines of text, then the training loss as a curve in the rest of the screen.

    ``written`` is when the last record came, in seconds since 1970.
    """
    steps, validations = training_lines(records)
    total = config.train.epochs * per_epoch
    if not steps:
        return f"{root}  recipe {config.recipe}: no step has been logged yet"
    last = steps[-1]
    done = max(record["step"] for record in (*steps, *validations))
    rates = [r["images_per_second"] for r in steps[-_RATES:]]
    rate = statistics.median(rates)  # the first line of a run has the compiling in it
    left = max(0, total - done) * config.train.batch_size / rate if rate > 0 else 0.0
    ago = f"last line {duration(time.time() - written)} ago"
    of = " of" if done <= total else ", the recipe has"  # --epochs and --steps train on
    lines = [
        f"{root}  recipe {config.recipe}",
        f"step {done:,}{of} {total:,}  epoch {done / per_epoch:.2f}{of} {config.train.epochs}",
        f"loss {last['loss']:.4f}  lr {last['lr']:.4g}  {rate:.1f} images/s  waiting for data {last['data_wait']:.1%}",
        f"{duration(left)} left to the recipe's end at this speed; {ago}" if left else f"the recipe's end; {ago}",
    ]
    if validations:
        best = max(validations, key=lambda record: record["top1"])
        newest = validations[-1]
        among = f"top-5 {newest['top5']:.2%}  " if classes > 5 else ""  # of five or fewer the right one always is
        lines.append(
            f"validation top-1 {newest['top1']:.2%}  {among}loss {newest['validation_loss']:.4f}  "
            f"best {best['top1']:.2%}, step {best['step']:,}"
        )
    lines = [line[:width] for line in lines]
    if not can_show("⠿"):
        return "\n".join(lines)
    points = [(r["step"] / per_epoch, r["loss"]) for r in steps]
    if len(points) < 2:
        return "\n".join([*lines, "", "the loss curve begins with the second logged line"])
    curve = braille(points, max(20, width - 10), max(4, min(16, height - len(lines) - 5)))
    return "\n".join([*lines, "", "training loss by epoch", *curve])


def braille(points: Sequence[tuple[float, float]], columns: int, rows: int) -> list[str]:
    """A curve in braille characters, each two dots wide and four high; with the range of both axes."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    wide, tall = columns * 2, rows * 4
    cells = [[0] * columns for _ in range(rows)]
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    before: tuple[int, int] | None = None
    for x, y in points:
        here = (
            round((x - left) / ((right - left) or 1) * (wide - 1)),
            round((high - y) / ((high - low) or 1) * (tall - 1)),
        )
        for column, row in _between(before or here, here):
            cells[row // 4][column // 2] |= bits[row % 4][column % 2]
        before = here
    text = ["".join(chr(0x2800 + cell) for cell in row) for row in cells]
    names = [f"{high:8.3f}", *[" " * 8] * (rows - 2), f"{low:8.3f}"]
    ends = f"{left:.2f}".ljust(columns - 8) + f"{right:.2f}".rjust(8)
    return [*(f"{name} {line}" for name, line in zip(names, text, strict=True)), f"{'':8} {ends}"]


def _between(a: tuple[int, int], b: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a straight line from a to b."""
    count = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
    return [
        (round(a[0] + (b[0] - a[0]) * i / count), round(a[1] + (b[1] - a[1]) * i / count)) for i in range(count + 1)
    ]
