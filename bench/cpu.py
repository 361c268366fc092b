"""The CPU backend beside PyTorch on this machine: ``python -m bench.cpu`` prints one table and ends.

What is compared, all in fp32, with the seed recipe's network at 1000 classes and all cores:

- **training** and **forward**: what ``--stage train`` and ``--stage eval`` do on real shards, loader included (the
  rates are the ones the stages write themselves), beside bare loops of PyTorch, eager and ``torch.compile``, that are
  spared the loader;
- the same beside what a *direct* convolution could reach if everything but its multiplications cost nothing, at the
  rate of NumPy's SGEMM in this run;
- **peak memory** of the training processes, from the system's accounts;
- **start**: from the command to the line that announces the first training step, and to the first line of metrics,
  written after it; with and without compiled kernels on disk;
- **batch 1**: the prediction of one picture, bare loops on both sides;
- the stages with one thread and with all.

Every contestant runs in a process of its own; they take turns, ``--rounds`` times, and medians count. A process's first
step is left out. The pictures are drawn on the spot and preprocessed by ``--stage preprocess``; ``--run DIR`` keeps
them. ``--only`` measures a part; with ``--json FILE`` the figures of several parts collect in one file, and the table
shows all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench import command
from bench.cpu_sides import CLASSES
from net.alexnet import alexnet, table
from pipeline.command_line import at_least_one

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("train", "forward", "one", "threads", "start")
COMPARED = frozenset(("train", "forward", "one"))  # with PyTorch
PICTURES = 2  # of each class to train on; one to validate with


@dataclass(frozen=True)
class Process:
    """What a finished process left, and when it got how far."""

    out: str
    memory: int  # bytes, the most that was resident
    announced: float  # seconds until it said that training begins
    first_line: float  # seconds until the file watched had a line


def run(command: list[str], watched: Path | None = None, **environment: str) -> Process:
    """Run a command to its end; ``watched`` is a file whose first line is waited for."""
    start = time.perf_counter()
    announced = first_line = float("nan")
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT
        )
        done = 0
        while not done:
            if announced != announced and b"\ntrain " in b"\n" + os.pread(output.fileno(), 1 << 16, 0):
                announced = time.perf_counter() - start
            if watched is not None and first_line != first_line and watched.exists() and watched.stat().st_size:
                first_line = time.perf_counter() - start
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if not done:
                time.sleep(0.005)
        process.returncode = os.waitstatus_to_exitcode(status)  # wait4 has reaped it
        output.seek(0)
        text = output.read()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}:\n{text}")
    return Process(text, usage.ru_maxrss * 1024, announced, first_line)


def stage(name: str, run_dir: Path, *options: str, watched: Path | None = None, **environment: str) -> Process:
    command = [sys.executable, "run_pipeline.py", "--stage", name, "--run", str(run_dir), *options]
    return run(command, watched, **environment)


def prepare(run_dir: Path, batch: int) -> None:
    """Blotches in 1000 classes, preprocessed, where they are not there yet."""
    if (run_dir / "preprocess" / "manifest.json").exists():
        return
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", PICTURES), ("val", 1)):
            for label in range(CLASSES):
                home = Path(folder, split, f"n{label:08d}")
                home.mkdir(parents=True)
                for number in range(count):
                    small = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                    Image.fromarray(small).resize((256, 256)).save(home / f"{number}.jpg")
        settings = ("--set", f"train.batch_size={batch}", "--set", f"eval.batch_size={batch}")
        stage("preprocess", run_dir, "--source", folder, "--recipe", "seed", *settings)


def train(run_dir: Path, steps: int, batch: int, **environment: str) -> tuple[list[float], Process]:
    """Images a second of each step but the first of a training run from the beginning, and its process."""
    metrics = run_dir / "train" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    options = ["--restart", "--steps", str(steps), "--device", "cpu"]
    for setting in ("train.log_every=1", f"train.batch_size={batch}", "train.lr=[[0,0.0001]]"):
        options += ["--set", setting]
    process = stage("train", run_dir, *options, watched=metrics, **environment)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line["images_per_second"] for line in lines if "images_per_second" in line][1:], process


def evaluation(run_dir: Path, batch: int, **environment: str) -> float:
    """Images a second of an evaluation, as the stage reports it."""
    stage("eval", run_dir, "--views", "1", "--device", "cpu", "--set", f"eval.batch_size={batch}", **environment)
    return json.loads((run_dir / "eval" / "metrics.json").read_text())["images_per_second"]


def bare(side: str, kind: str, steps: int, batch: int) -> tuple[list[float], Process]:
    """Images a second of each call of a bare loop, and its process."""
    command = [sys.executable, "-m", "bench.cpu_sides", side, kind, "--steps", str(steps), "--batch", str(batch)]
    process = run(command)
    return [batch / seconds for seconds in json.loads(process.out.splitlines()[-1])], process


def sgemm() -> float:
    """GFLOP/s of NumPy's product of 2048 x 2048 matrices, the best of some: a ceiling must not be set too low."""
    a = np.random.default_rng(0).standard_normal((2048, 2048), dtype=np.float32)
    out = np.empty_like(a)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        np.matmul(a, a, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best / 1e9


def direct_work() -> tuple[float, float]:
    """GFLOP of an image directly convolved: a training step (conv1 needs no dx) and a forward pass."""
    rows = table(alexnet(CLASSES))
    forward = sum(row.multiply_adds for row in rows)
    return 2 * (3 * forward - rows[0].multiply_adds) / 1e9, 2 * forward / 1e9


def measure(options: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    """The samples of all parts asked for, by name; PyTorch's and ours in turns."""
    found: dict[str, list[float]] = {}
    batch, steps = options.batch, options.steps
    peers = ["eager"] if options.no_compile else ["eager", "compile"]

    def note(name: str, values: list[float] | float) -> None:
        values = values if isinstance(values, list) else [values]
        found.setdefault(name, []).extend(values)
        print(f"  {name}: {', '.join(f'{v:.4g}' for v in values)}", flush=True)

    for _ in range(options.rounds):
        if {"train", "forward"} & set(options.only):
            note("sgemm GFLOP/s", sgemm())
        if "train" in options.only:
            rates, process = train(run_dir, steps + 1, batch)
            note("train hand", rates)
            note("memory hand", process.memory / 2**20)
            for peer in peers:
                rates, process = bare(peer, "train", steps, batch)
                note(f"train {peer}", rates)
                note(f"memory {peer}", process.memory / 2**20)
        if "forward" in options.only:
            if not (run_dir / "train" / "latest.json").exists():
                train(run_dir, 1, batch)
            note("forward hand", evaluation(run_dir, batch))
            for peer in peers:
                note(f"forward {peer}", bare(peer, "forward", steps, batch)[0])
        if "one" in options.only:
            for side in ("hand", *peers):
                note(f"one {side}", bare(side, "forward", 40, 1)[0])
        if "threads" in options.only:
            for threads in ("1", str(len(os.sched_getaffinity(0)))):
                few = {"NUMBA_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
                note(f"train, threads {threads}", train(run_dir, steps + 1, batch, **few)[0])
                note(f"forward, threads {threads}", evaluation(run_dir, batch, **few))
        if "start" in options.only:
            with tempfile.TemporaryDirectory() as empty:
                for kernels, where in (("warm", {}), ("cold", {"NUMBA_CACHE_DIR": empty})):
                    process = train(run_dir, 1, batch, **where)[1]
                    note(f"start {kernels}, announced s", process.announced)
                    note(f"start {kernels} s", process.first_line)
    return found


def report(found: dict[str, list[float]]) -> list[tuple[str, str, str, str]]:
    """Rows of the table: figure, values, ratio and target."""
    median = {name: statistics.median(values) for name, values in found.items()}
    rows = []

    def against(title: str, ours: str, theirs: str, target: float, unit: str, at_most: bool = False) -> None:
        if ours in median and theirs in median:
            ratio = median[ours] / median[theirs]
            verdict = "reached" if (ratio <= target if at_most else ratio >= target) else "missed"
            bound = f"{'at most' if at_most else 'at least'} {target:g}: {verdict}"
            rows.append((title, f"{median[ours]:.1f} / {median[theirs]:.1f} {unit}", f"{ratio:.2f}", bound))

    against("training, ours / PyTorch eager", "train hand", "train eager", 4.5, "images/s")
    against("training, ours / torch.compile", "train hand", "train compile", 3, "images/s")
    against("forward, ours / PyTorch eager", "forward hand", "forward eager", 4, "images/s")
    against("forward, ours / torch.compile", "forward hand", "forward compile", 1, "images/s")
    if "sgemm GFLOP/s" in median:
        for kind, work, target in zip(("train", "forward"), direct_work(), (1.4, 1.4), strict=True):
            median[f"direct {kind}"] = max(found["sgemm GFLOP/s"]) / work
            against(f"{kind}, ours / direct at the GEMM ceiling", f"{kind} hand", f"direct {kind}", target, "images/s")
    against("peak memory in training, ours / PyTorch", "memory hand", "memory eager", 0.8, "MiB", at_most=True)
    against("batch 1 forward, ours / PyTorch eager", "one hand", "one eager", 1, "images/s")
    for title, name, bound in (
        ("start to first step, kernels on disk", "start warm, announced s", 3),
        ("start to first step's metrics, kernels on disk", "start warm s", 3),
        ("start to first step, first ever", "start cold, announced s", 60),
        ("start to first step's metrics, first ever", "start cold s", 60),
    ):
        if name in median:
            verdict = "reached" if median[name] <= bound else "missed"
            rows.append((title, f"{median[name]:.1f} s", "", f"at most {bound} s: {verdict}"))
    for name in median:
        if ", threads " in name:
            rows.append((name, f"{median[name]:.1f} images/s", "", ""))
    return rows


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def folder_for(path: Path | None) -> Iterator[Path]:
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder, "run")


def main() -> int:
    parser = command("cpu", __doc__)
    parser.add_argument("--batch", type=at_least_one, default=128)
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--steps", type=at_least_one, default=3, help="steps a process is timed over")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="measure these parts")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which needs a C++ compiler")
    parser.add_argument("--run", type=Path, metavar="DIR", help="keep the preprocessed pictures in this run directory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures in FILE, beside those it holds")
    options = parser.parse_args()
    if COMPARED & set(options.only):
        import torch  # noqa: F401  where it is missing, that is told before minutes of measuring
    with folder_for(options.run) as run_dir:
        prepare(run_dir.absolute(), options.batch)
        found = measure(options, run_dir.absolute())
    facts = {
        "date": date.today().isoformat(),
        "machine": processor(),
        "threads": len(os.sched_getaffinity(0)),
        "batch": options.batch,
        "numpy": np.__version__,
    }
    if options.json:
        if options.json.exists():
            found = json.loads(options.json.read_text())["samples"] | found
        options.json.write_text(json.dumps(facts | {"samples": found}, indent=1) + "\n")
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    print("| figure | medians | ratio | target |\n|---|---|---|---|")
    for row in report(found):
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
