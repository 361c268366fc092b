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
import io
import itertools
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

from PIL import Image

from data.sampling import steps_per_epoch
from data.shards import read_manifest
from net.backend import choose
from pipeline.checkpoint import checkpoints
from pipeline.config import RECIPES, Config, Schedule, override, to_dict
from pipeline.metrics import read_metrics
from pipeline.run_dir import RunDir, make_folder, read_json, write_atomic, write_json, write_sealed

ROOT: Final = Path(__file__).resolve().parents[1]
BASE: Final = "original"  # what the ablations leave something out of, and what PyTorch repeats
# Left out, settings that leave it out, and what the paper and the authors' own logs say it is worth.
ABLATIONS: Final = (
    (
        "LRN",
        ("network.lrn_size=0", "network.map_norm=false"),
        "1.4 / 1.2 points (section 3.3); net 148 beside net 145: 1.4 / 1.2",
    ),
    (
        "overlap in pooling",
        ("network.pool_size=2",),
        "0.4 / 0.3 points (section 3.4); net 147 beside net 145: 0.4 / 0.3",
    ),
    ("colour jitter", ("input.jitter=0",), "over 1 point top-1 (section 4.1)"),
    ("dropout", ("network.dropout_keep=1",), '"substantial overfitting" (section 4.2)'),
    ("flips", ("input.flip=false",), '"substantial overfitting" without crops and flips (section 4.1)'),
)
THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
ABOVE_CHANCE: Final = 0.05  # nats below ln(classes) from which on a run has left the plateau
_SMOOTH: Final = 5  # logged losses whose mean decides that
LOG_EVERY: Final = 5  # steps
FIRST_STEPS: Final = 500  # of the training curves, compared apart from the rest
_CURVE: Final = 10  # logged losses whose mean is a point of a curve that is compared with another


@dataclass(frozen=True)
class Planned:
    """One training run: a recipe with single settings changed, by hand or by PyTorch."""

    name: str
    recipe: str
    seed: int
    changes: tuple[str, ...] = ()
    torch: bool = False


@dataclass(frozen=True)
class How:
    """What is the same for all runs: how long, on which batches, with which settings, and where they are computed."""

    epochs: int
    batch: int
    changes: tuple[str, ...] = ()  # the command line's own settings
    device: str = "cpu"  # resolved: never "auto"
    precision: str = "fp32"
    machine: str = ""
    jobs: int = 1


def planned(base: str, seeds: Sequence[int]) -> list[Planned]:
    """All runs, the ones that say most first, and PyTorch's, which take longest, early enough to be done in time."""
    recipes: list[tuple[str, str, tuple[str, ...]]] = [
        ("seed", "seed", ()),
        ("seed without the last ReLU", "seed", ("network.final_relu=false",)),
        ("original", "original", ()),
        ("caffe", "caffe", ()),
        ("paper", "paper", ()),
    ]
    others = [entry for entry in recipes if entry[0] != base]
    runs = []
    for seed in seeds:
        runs += [Planned(base, base, seed), Planned(f"{base} in PyTorch", base, seed, torch=True)]
    runs += [Planned(name, recipe, seed, changes) for seed in seeds for name, recipe, changes in others]
    return runs + [
        Planned(f"{base} without {what}", base, seed, changes) for seed in seeds for what, changes, _ in ABLATIONS
    ]


def scaled(schedule: Schedule, factor: float) -> Schedule:
    """The schedule with its epochs multiplied and rounded up; of values that meet in one epoch the last counts."""
    return tuple({math.ceil(epoch * factor): value for epoch, value in schedule}.items())


def configured(run: Planned, how: How) -> Config:
    """The run's complete configuration."""
    config = override(RECIPES[run.recipe], None, [*run.changes, *how.changes], run.seed)
    train, inp = config.train, config.input
    factor = how.epochs / train.epochs
    train = replace(
        train,
        epochs=how.epochs,
        batch_size=how.batch,
        lr=scaled(train.lr, factor),
        bias_lr=scaled(train.bias_lr, factor),
        conv1_lr=scaled(train.conv1_lr, factor),
        log_every=LOG_EVERY,
        keep_checkpoints=1,
    )
    if inp.jitter_epochs is not None:
        inp = replace(inp, jitter_epochs=math.ceil(inp.jitter_epochs * factor))
    return override(replace(config, train=train, input=inp))


def folder_of(out: Path, run: Planned, how: How) -> RunDir:
    slug = "-".join(run.name.lower().split())
    suffix = "" if how.precision == "fp32" else f"-{how.precision}"
    return RunDir(out / f"{slug}-seed{run.seed}-{how.epochs}x{how.batch}{suffix}")


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
        raise SystemExit(f"preprocessing failed; see {log}")


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
    steps = [(r["step"] / per_epoch, r["loss"]) for r in records if "loss" in r]
    rates = [r["images_per_second"] for r in records if "loss" in r]
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


def markdown(results: Sequence[dict[str, Any]], base: str) -> str:
    """The tables: every run with its seeds side by side, and the ablations beside the paper's figures."""
    names = list(dict.fromkeys(r["name"] for r in results))
    groups = {name: [r for r in results if r["name"] == name] for name in names}
    lines = [
        "# Evidence that it learns",
        "",
        "Accuracy in percent on the validation pictures, a figure a seed; chance is "
        f"{100 / results[0]['classes']:.3g} %."
        if results
        else "No run has begun.",
        "",
        "| run | epochs | top-1 centre | top-1 ten views | top-5 ten views | loss centre | leaves chance after | "
        "images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        cells = [
            name,
            _each(group, _epochs_done, same=True),
            _each(group, lambda r: _percent(r, "centre", "top1")),
            _each(group, lambda r: _percent(r, "ten_views", "top1")),
            _each(group, lambda r: _percent(r, "ten_views", "top5")),
            _each(group, lambda r: f"{r['centre']['loss']:.3f}" if "centre" in r else _state(r)),
            _each(group, _takeoff),
            _each(group, lambda r: "none" if r["images_per_second"] is None else f"{r['images_per_second']:,.0f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_curves(groups, base), *_ablations(groups, base), *_failures(results)]
    if results:
        last = results[-1]
        shared = f"; {last['jobs']} runs at a time shared it, so no rate is the machine's" if last["jobs"] > 1 else ""
        lines += [
            "",
            f"Machine: {last['machine']}; {last['date']}; {last['precision']}, batch {last['batch']}{shared}.",
        ]
    return "\n".join(lines) + "\n"


def apart(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], first: int, last: int
) -> tuple[float, ...] | None:
    """How far two training curves are apart in steps ``first`` to ``last``, each a mean over ten logged losses.

    The mean of a - b, the mean of its absolute value and the largest; None where the curves have no such steps both.
    """
    differences = [x[1] - y[1] for x, y in zip(a, b, strict=False)]
    step = [LOG_EVERY * (end + 1) for end in range(len(differences))]
    smooth = [
        statistics.mean(differences[end - _CURVE + 1 : end + 1])
        for end in range(_CURVE - 1, len(differences))
        if first <= step[end] - LOG_EVERY * _CURVE + 1 and step[end] <= last
    ]
    if not smooth:
        return None
    sizes = [abs(d) for d in smooth]
    return statistics.mean(smooth), statistics.mean(sizes), max(sizes)


def _curves(groups: dict[str, list[dict[str, Any]]], base: str) -> list[str]:
    """The training curve by hand beside PyTorch's, seed by seed, and how far two seeds are apart."""
    by_seed = [
        {r["seed"]: r for r in groups.get(name, []) if "failed" not in r} for name in (base, f"{base} in PyTorch")
    ]
    hand, torch = by_seed
    pairs = [(f"by hand - PyTorch, seed {s}", hand[s], torch[s]) for s in hand if s in torch]
    for who, runs in zip(("by hand", "PyTorch"), by_seed, strict=True):
        pairs += [(f"seed {s} - seed {t}, {who}", runs[s], runs[t]) for s, t in itertools.combinations(runs, 2)]
    end = max((LOG_EVERY * len(r["training"]) for runs in by_seed for r in runs.values()), default=0)
    spans = [(1, min(FIRST_STEPS, end)), *([(FIRST_STEPS + 1, end)] if end > FIRST_STEPS else [])]
    rows = []
    for name, one, other in pairs:
        found = [apart(one["training"], other["training"], *span) for span in spans]
        if None not in found:
            rows.append(f"| {name} | " + " | ".join(f"{f[0]:+.3f}, {f[1]:.3f}, {f[2]:.3f}" for f in found) + " |")
    head = [
        f"Training loss of {base}, the differences of two curves in nats: their mean, the mean of their size, the "
        f"largest. A point of a curve is the mean of {_CURVE} logged losses ({_CURVE * LOG_EVERY} steps):",
        "",
        f"| curves | {' | '.join(f'steps {first} to {last}' for first, last in spans)} |",
        f"|---|{'---|' * len(spans)}",
    ]
    return [*head, *rows, ""] if rows else []


def _ablations(groups: dict[str, list[dict[str, Any]]], base: str) -> list[str]:
    """Points of error that leaving something out costs, seed by seed, beside what others found on the full set."""
    whole = {r["seed"]: r for r in groups.get(base, []) if "ten_views" in r}
    rows = []
    for what, _, paper in ABLATIONS:
        group = [r for r in groups.get(f"{base} without {what}", []) if r["seed"] in whole]
        if not [r for r in group if "failed" in r or "ten_views" in r]:
            continue
        cells = [_each(group, partial(_cost, whole, view)) for view in ("centre", "ten_views")]
        rows.append(f"| {what} | {' | '.join(cells)} | {paper} |")
    head = [
        f"What it costs to leave something out of {base}, in points of top-1 error, a figure a seed:",
        "",
        "| left out | centre | ten views | paper, authors' logs (ILSVRC, top-1 / top-5) |",
        "|---|---|---|---|",
    ]
    return [*head, *rows] if rows else []


def _cost(whole: Mapping[int, dict[str, Any]], view: str, r: dict[str, Any]) -> str:
    if view not in r:
        return _state(r)
    if r["leaves_chance_after"] is None:
        return "at chance"
    return f"{100 * (whole[r['seed']][view]['top1'] - r[view]['top1']):+.1f}"


def _failures(results: Sequence[dict[str, Any]]) -> list[str]:
    failed = [r for r in results if "failed" in r]
    return ["", *(f"- {r['name']}, seed {r['seed']}: {r['failed']}" for r in failed)] if failed else []


def _each(group: Sequence[dict[str, Any]], text: Any, *, same: bool = False) -> str:
    values = [text(r) for r in group]
    return values[0] if same and len(set(values)) == 1 else " / ".join(values)


def _percent(r: dict[str, Any], view: str, key: str) -> str:
    return f"{100 * r[view][key]:.1f}" if view in r else _state(r)


def _epochs_done(r: dict[str, Any]) -> str:
    done = max((points[-1][0] for points in (r["training"], r["validation"]) if points), default=0)
    return f"{done:.3g} of {r['epochs']}"


def _state(r: dict[str, Any]) -> str:
    return "failed" if "failed" in r else "unfinished"


def _takeoff(r: dict[str, Any]) -> str:
    after = r["leaves_chance_after"]
    return "never" if after is None and "centre" in r else "not yet" if after is None else f"{after} epochs"


def picture(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Training loss and validation accuracy of every run, the seeds of one in one colour."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(12, 5.2), dpi=120, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    names = list(dict.fromkeys(r["name"] for r in results))
    colours = colormaps["tab20"].colors
    for r in results:
        look = {"color": colours[names.index(r["name"]) % len(colours)], "linewidth": 1.2}
        look |= {"linestyle": "--"} if r["by"] == "PyTorch" else {}
        look |= {"marker": ".", "markersize": 3}
        smooth = _epoch_means(r["training"])
        loss.plot([x for x, _ in smooth], [y for _, y in smooth], **look)
        first = next(other for other in results if other["name"] == r["name"]) is r
        accuracy.plot(
            [v[0] for v in r["validation"]],
            [v[1] for v in r["validation"]],
            label=r["name"] if first else None,
            **look,
        )
    loss.set(title="Training loss, mean of each epoch", xlabel="epoch", ylabel="nats", xlim=(0, None))
    # A run that diverges is cut off: the others are to be seen.
    loss.set_ylim(0, 1.3 * math.log(max((r["classes"] for r in results), default=10)))
    accuracy.set(title="Validation top-1, centre view", xlabel="epoch", xlim=(0, None), ylim=(0, 1))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (loss, accuracy):
        axes.grid(alpha=0.25)
    if results:
        figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    # A page of a few colours: a third of the bytes.
    small = io.BytesIO()
    Image.open(file).convert("RGB").quantize(128).save(small, format="png", optimize=True)
    write_atomic(path, lambda out: out.write(small.getvalue()) and None)


def _epoch_means(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """A point an epoch, at its end."""
    epochs: dict[int, list[float]] = {}
    for x, y in points:
        epochs.setdefault(math.ceil(x), []).append(y)
    return [(float(epoch), statistics.mean(values)) for epoch, values in sorted(epochs.items())]


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
    write_atomic(out / "evidence.md", lambda file: file.write(markdown(results, base).encode()) and None)
    picture(results, out / "evidence.png")


def few_threads(jobs: int) -> dict[str, str]:
    """Environment variables that share the cores among ``jobs`` processes; none where one has them all."""
    if jobs == 1:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {name: str(max(1, cores // jobs)) for name in THREADS if name not in os.environ}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence", description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, help="the pictures; not needed once they are preprocessed")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="default %(default)s")
    parser.add_argument("--epochs", type=int, default=20, help="of every run (default %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="pictures a step, of every run (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="N", help="default 0 1")
    parser.add_argument("--base", default=BASE, choices=list(RECIPES), help="recipe of PyTorch's run and the ablations")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs of these names only, as --list prints them")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of every run")
    parser.add_argument("--device", default="auto", help="as run_pipeline.py takes it")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16"), help="PyTorch's as well")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop what is at work then; default: never")
    parser.add_argument("--report", nargs="*", metavar="NAME", help="a report for these runs' first seed; default: all")
    parser.add_argument("--keep", action="store_true", help="keep the weights of finished runs, 460 MB each")
    parser.add_argument("--list", action="store_true", help="show the plan and what is done of it, and run nothing")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    out = options.out.resolve()
    everything = planned(options.base, options.seeds)
    names = {run.name for run in everything}
    if unknown := {*(options.only or ()), *(options.report or ())} - names:
        parser.error(f"no run is called {', '.join(sorted(unknown))}; --list shows the names")
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    how = How(options.epochs, options.batch, tuple(options.set), options.device, options.precision, jobs=options.jobs)
    places = {run: folder_of(out, run, how) for run in everything}

    def done(run: Planned) -> bool:
        path = places[run].root / "result.json"
        return path.exists() and "failed" not in read_json(path, "remove it")

    runs = [run for run in everything if not options.only or run.name in options.only]
    if options.list:
        for run in runs:
            print(f"{'done' if done(run) else 'left':5s} seed {run.seed}  {run.name}")
        return 0
    if options.source is None and not (out / "pictures" / "preprocess" / "manifest.json").exists():
        parser.error("--source is needed the first time")
    device, why = choose(options.device)
    how = replace(how, device=device, machine=machine(device))
    print(f"{how.machine}: {device} ({why}), {how.precision}, {how.jobs} at a time", flush=True)

    def reported(run: Planned) -> bool:
        return options.report is None or (run.name in options.report and run.seed == options.seeds[0])

    def say(what: str) -> None:
        print(f"{datetime.datetime.now():%H:%M:%S}  {what}", flush=True)

    def task(run: Planned) -> Callable[[], None]:
        def carry() -> None:
            children.check()
            say(f"{run.name}, seed {run.seed}: {places[run].root}")
            carry_out(children, run, how, places[run], keep=options.keep, report=reported(run))
            say(f"{run.name}, seed {run.seed}: done")

        return carry

    def write() -> None:
        write_results(collect(everything, out, how), out, options.base)

    children, signals = Children(few_threads(options.jobs)), Signals()
    if options.source is not None:
        first = partial(prepare, children, options.source.resolve(), out, options.set)
        if not carry_out_all(children, signals, [first], 1, deadline, lambda: say("the pictures are prepared")):
            raise SystemExit(128 + signals.number if signals.number else 1)
    tasks = [task(run) for run in runs if not done(run)]
    complete = carry_out_all(children, signals, tasks, options.jobs, deadline, write)
    write()
    print((out / "evidence.md").read_text())
    if signals.number:
        return 128 + signals.number
    if not complete:
        print("not everything is finished; the same command goes on where this one stopped", file=sys.stderr)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
