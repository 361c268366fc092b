"""Does it learn? The recipes on real photographs, the same in PyTorch, and what each of the paper's ideas adds.

    python -m bench.evidence --source DIR --epochs 20 --seeds 0 1     all of it, into runs/evidence/
    python -m bench.evidence --epochs 20 --seeds 0 1 --list           what is done and what is left
    python -m bench.evidence --source DIR --epochs 20 --only original "original in PyTorch"
    python -m bench.evidence --source DIR --epochs 60 --device gpu --precision bf16 --jobs 5 --minutes 6 \\
        --set train.validate_every=5 --set train.save_every=60 --report original

DIR holds pictures as ``--stage preprocess`` takes them. Every run goes through the real stages in processes of their
own: train to the end of the schedule, evaluate the last checkpoint with the centre view and with ten. The schedule is
the recipe's own, with its epochs scaled to ``--epochs``; its numbers are otherwise as they stand in
``pipeline/config.py``, but for the batch size, which is the same for all (``--batch``).

A run that was stopped goes on where it was, one that is done is not done again; a stopped run's checkpoint stays, a
finished run's weights are removed (``--keep`` keeps them). After each run ``evidence.json``, ``evidence.md`` and
``evidence.png`` in the output folder are written anew. ``--epochs``, ``--batch`` and ``--precision`` are part of a
run's folder name; for other ``--set`` choose another ``--out``.

``--jobs`` runs go on at a time; they share the GPU, or the cores, so a run's images/s are not what the machine could
do. After ``--minutes`` nothing new is started and the runs at work are told to save and stop: they stand in the results
as far as they came. On a small set and a fast card an epoch is over sooner than its validation, and much sooner than
its checkpoint of 490 MB: see ``train.validate_every`` and ``train.save_every``.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

from bench import command
from bench.evidence_plan import BASE, LOG_EVERY, How, Planned, configured, folder_of, planned
from bench.evidence_tables import markdown, picture
from data.manifest import read_manifest
from data.sampling import steps_per_epoch
from net.backend import choose
from pipeline.checkpoint import checkpoints
from pipeline.command_line import at_least_one
from pipeline.config import RECIPES
from pipeline.config_values import to_dict
from pipeline.metrics import read_metrics
from pipeline.run_dir import RunDir, make_folder, read_json, write_bytes, write_json, write_sealed

ROOT: Final = Path(__file__).resolve().parents[1]
THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
ABOVE_CHANCE: Final = 0.05  # nats below ln(classes) from which on a run has left the plateau
_SMOOTH: Final = 5  # logged losses whose mean decides that


# --- running -------------------------------------------------------------------------------------------------------


STOPPED: Final = (*(128 + s for s in (signal.SIGINT, signal.SIGTERM)), -signal.SIGINT, -signal.SIGTERM)  # statuses


class StoppingError(Exception):
    """A stage was stopped by a signal, or is not started any more: its run stays unfinished."""


class Children:
    """Runs stages in processes of their own, from several threads at once; those at work can be told to stop."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = {**os.environ, **environment}
        self._working: set[subprocess.Popen[bytes]] = set()
        self._stopping = False
        self._lock = threading.Lock()

    def run(self, arguments: Sequence[str], log: Path) -> int:
        """Run ``python ARGUMENTS``, its output at the end of ``log``; returns the exit status."""
        with open(log, "ab") as file:
            file.write(f"$ python {' '.join(arguments)}\n".encode())
            file.flush()
            with self._lock:
                self.check()
                child = subprocess.Popen(
                    [sys.executable, *arguments], cwd=ROOT, stdout=file, stderr=file, env=self._environment
                )
                self._working.add(child)
            status = child.wait()
            with self._lock:
                self._working.remove(child)
        if status in STOPPED:
            raise StoppingError
        return status

    def check(self) -> None:
        """Raise where nothing may be started any more."""
        if self._stopping:
            raise StoppingError

    def stop(self, *, tell: bool) -> None:
        """Start nothing any more; ``tell`` the stages at work to save and stop."""
        with self._lock:
            self._stopping = True
            for child in self._working if tell else ():
                child.terminate()


class Signals:
    """Notes SIGTERM and SIGINT, for the main loop to look at."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number


def carry_out_all(
    children: Children,
    signals: Signals,
    tasks: Sequence[Callable[[], None]],
    jobs: int,
    deadline: float,
    finished: Callable[[], None],
) -> bool:
    """Do the tasks in order, ``jobs`` at a time, until ``deadline`` (of ``time.monotonic``); whether all were done.

    ``finished`` is called after each, here and nowhere else, so that the results have one writer.
    """
    complete, told = True, False
    with ThreadPoolExecutor(jobs) as pool:
        left = {pool.submit(task) for task in tasks}
        try:
            while left:
                done, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    if isinstance(future.exception(), StoppingError):
                        complete = False
                    else:
                        future.result()  # raises what went wrong in the task
                if done and not told:
                    finished()
                if not told and (signals.number or time.monotonic() > deadline):
                    # Ctrl-C reaches the children by itself, and twice would be an order to stop without saving.
                    children.stop(tell=signals.number != signal.SIGINT)
                    told = True
        except BaseException:
            children.stop(tell=True)
            raise
    return complete


def prepare(children: Children, source: Path, out: Path, changes: Sequence[str]) -> None:
    """Preprocess the pictures once; all runs share the shards. Quick where that has been done."""
    pictures = RunDir(out / "pictures")
    log = make_folder(out) / "preprocess.log"
    arguments = ["--stage", "preprocess", "--source", str(source), "--recipe", BASE, "--run", str(pictures.root)]
    settings = [part for change in changes for part in ("--set", change)]
    if children.run(["run_pipeline.py", *arguments, *settings], log) != 0:
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise SystemExit(f"preprocessing failed; see {log}, which ends with: {last}")


def carry_out(children: Children, run: Planned, how: How, folder: RunDir, *, keep: bool, report: bool) -> None:
    """Train and evaluate one run; writes ``result.json`` into its folder, a failure's too."""
    make_folder(folder.root)
    if not folder.preprocess.exists():
        folder.preprocess.symlink_to(Path("..") / "pictures" / "preprocess")
    write_sealed(folder.config, to_dict(configured(run, how)))
    log = folder.root / "log.txt"
    where = ["--run", str(folder.root)]
    computing = ["--device", how.device, "--precision", how.precision]
    stage = ["run_pipeline.py", *where, *computing, "--stage"]
    cuda = ["--device", "cuda" if how.device == "gpu" else "cpu", "--precision", how.precision]
    training = ["-m", "bench.evidence_torch", *where, *cuda] if run.torch else [*stage, "train", "--resume"]
    began = time.monotonic()

    def keep_result(**more: Any) -> None:
        write_json(folder.root / "result.json", {**result(run, how, folder), **more})

    if children.run(training, log) != 0:
        keep_result(failed=_last_error(log))
        return
    seconds = round(time.monotonic() - began, 1)
    views = {}
    for count in (1, 10):
        if children.run([*stage, "eval", "--views", str(count)], log) != 0:
            keep_result(failed=f"in evaluation: {_last_error(log)}")
            return
        views[count] = read_json(folder.eval / "metrics.json", "evaluate again")
    if report and children.run([*stage, "report"], log) != 0:
        keep_result(failed=f"in the report: {_last_error(log)}")
        return
    keep_result(centre=views[1], ten_views=views[10], training_seconds=seconds)
    if not keep:
        for path in checkpoints(folder.train):
            path.unlink()


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1]).removeprefix("error: ")


# --- results -------------------------------------------------------------------------------------------------------


def result(run: Planned, how: How, folder: RunDir) -> dict[str, Any]:
    """What a run's metrics say, finished or not."""
    manifest = read_manifest(folder)
    per_epoch = steps_per_epoch(manifest["splits"]["train"]["images"], how.batch)
    records = read_metrics(folder.train / "metrics.jsonl")
    # The last step's line stands outside the equal distances at which curves are compared.
    lines = [r for r in records if "loss" in r and r["step"] % LOG_EVERY == 0]
    steps = [(r["step"] / per_epoch, r["loss"]) for r in lines]
    rates = [r["images_per_second"] for r in lines]
    return {
        "name": run.name,
        "recipe": run.recipe,
        "changes": list(run.changes),
        "seed": run.seed,
        "by": "PyTorch" if run.torch else "hand",
        "folder": folder.root.name,
        "precision": how.precision,
        "epochs": how.epochs,
        "batch": how.batch,
        "classes": manifest["classes"],
        "training": [[round(x, 4), round(y, 5)] for x, y in steps],
        "validation": [
            [r["step"] / per_epoch, r["top1"], r["top5"], r["validation_loss"]] for r in records if "top1" in r
        ],
        "leaves_chance_after": leaves_chance(steps, manifest["classes"]),
        "images_per_second": round(statistics.median(rates), 1) if rates else None,
        "machine": how.machine,
        "jobs": how.jobs,
        "date": datetime.date.today().isoformat(),
    }


def leaves_chance(losses: Sequence[tuple[float, float]], classes: int) -> float | None:
    """The epoch at which the loss has left ln(classes), what a network scores that tells no picture from another.

    That is the middle of the first five logged losses whose mean is 0.05 nats below it; None where there are none.
    """
    for place in range(len(losses) - _SMOOTH + 1):
        window = losses[place : place + _SMOOTH]
        if sum(loss for _, loss in window) / _SMOOTH < math.log(classes) - ABOVE_CHANCE:
            return round(window[_SMOOTH // 2][0], 2)
    return None


def machine(device: str) -> str:
    """The processor's name and the number of cores; on a GPU its name first."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    host = f"{name}, {os.cpu_count()} cores"
    if device != "gpu":
        return host
    # Asked of a program, not of CuPy: this process shall take no memory on the card.
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        cards = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"a GPU whose name nvidia-smi did not tell ({error}); {host}"
    return f"{cards[0]}; {host}" if cards else host


def collect(runs: Sequence[Planned], out: Path, how: How) -> list[dict[str, Any]]:
    """The results of all runs that have begun, in the order of the plan."""
    found = []
    for run in runs:
        folder = folder_of(out, run, how)
        path = folder.root / "result.json"
        if path.exists():
            found.append(read_json(path, "remove it, and it is made again"))
        elif (folder.train / "metrics.jsonl").exists():
            found.append(result(run, how, folder))
    return found


def write_results(results: Sequence[dict[str, Any]], out: Path, base: str) -> None:
    write_json(out / "evidence.json", {"base": base, "runs": list(results)})
    write_bytes(out / "evidence.md", markdown(results, base).encode())
    picture(results, out / "evidence.png")


def few_threads(jobs: int) -> dict[str, str]:
    """Environment variables that share the cores among ``jobs`` processes; none where one has them all."""
    if jobs == 1:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {name: str(max(1, cores // jobs)) for name in THREADS if name not in os.environ}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options, refused where they name unknown runs or leave out what is needed."""
    parser = command("evidence", __doc__)
    parser.add_argument("--source", type=Path, help="the pictures; not needed once they are preprocessed")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="default %(default)s")
    parser.add_argument("--epochs", type=at_least_one, default=20, help="of every run (default %(default)s)")
    parser.add_argument(
        "--batch", type=at_least_one, default=128, help="pictures a step, of every run (default %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="N", help="default 0 1")
    parser.add_argument("--base", default=BASE, choices=list(RECIPES), help="recipe of PyTorch's run and the ablations")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs of these names only, as --list prints them")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of every run")
    parser.add_argument("--device", default="auto", help="as run_pipeline.py takes it")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16"), help="PyTorch's as well")
    parser.add_argument(
        "--jobs", type=at_least_one, default=1, metavar="N", help="runs at a time (default %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop what is at work then; default: never")
    parser.add_argument("--report", nargs="*", metavar="NAME", help="a report for these runs' first seed; default: all")
    parser.add_argument("--keep", action="store_true", help="keep the weights of finished runs, 460 MB each")
    parser.add_argument("--list", action="store_true", help="show the plan and what is done of it, and run nothing")
    options = parser.parse_args(arguments)
    names = {run.name for run in planned(options.base, options.seeds)}
    if unknown := {*(options.only or ()), *(options.report or ())} - names:
        parser.error(f"no run is called {', '.join(sorted(unknown))}; --list shows the names")
    options.out = options.out.resolve()
    if not (options.list or options.source or (options.out / "pictures" / "preprocess" / "manifest.json").exists()):
        parser.error("--source is needed the first time")
    return options


def say(what: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S}  {what}", flush=True)


def is_done(run: Planned, out: Path, how: How) -> bool:
    path = folder_of(out, run, how).root / "result.json"
    return path.exists() and "failed" not in read_json(path, "remove it")


def carry_out_told(children: Children, run: Planned, how: How, options: argparse.Namespace) -> None:
    """Train and evaluate one run, with a line before and a line after."""
    children.check()
    folder = folder_of(options.out, run, how)
    report = options.report is None or (run.name in options.report and run.seed == options.seeds[0])
    say(f"{run.name}, seed {run.seed}: {folder.root}")
    carry_out(children, run, how, folder, keep=options.keep, report=report)
    say(f"{run.name}, seed {run.seed}: done")


def run_all(runs: Sequence[Planned], how: How, options: argparse.Namespace, deadline: float) -> int:
    """Prepare the pictures, carry out what is not done yet, and write the results; returns the exit status."""
    out = options.out
    everything = planned(options.base, options.seeds)
    children, signals = Children(few_threads(options.jobs)), Signals()

    def write() -> None:
        write_results(collect(everything, out, how), out, options.base)

    if options.source is not None:
        first = partial(prepare, children, options.source.resolve(), out, options.set)
        if not carry_out_all(children, signals, [first], 1, deadline, lambda: say("the pictures are prepared")):
            raise SystemExit(128 + signals.number if signals.number else 1)
    tasks = [partial(carry_out_told, children, run, how, options) for run in runs if not is_done(run, out, how)]
    complete = carry_out_all(children, signals, tasks, options.jobs, deadline, write)
    write()
    print((out / "evidence.md").read_text())
    if signals.number:
        return 128 + signals.number
    if not complete:
        print("not everything is finished; the same command goes on where this one stopped", file=sys.stderr)
    return 0 if complete else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    how = How(options.epochs, options.batch, tuple(options.set), options.device, options.precision, jobs=options.jobs)
    runs = [run for run in planned(options.base, options.seeds) if not options.only or run.name in options.only]
    if options.list:
        for run in runs:
            print(f"{'done' if is_done(run, options.out, how) else 'left':5s} seed {run.seed}  {run.name}")
        return 0
    device, why = choose(options.device)
    how = replace(how, device=device, machine=machine(device))
    print(f"{how.machine}: {device} ({why}), {how.precision}, {how.jobs} at a time", flush=True)
    return run_all(runs, how, options, deadline)


if __name__ == "__main__":
    sys.exit(main())
