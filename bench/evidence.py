"""Does it learn? The recipes on real photographs, the same in PyTorch, and what each of the paper's ideas adds.

    python -m bench.evidence --source DIR --epochs 20 --seeds 0 1     all of it, into runs/evidence/
    python -m bench.evidence --epochs 20 --seeds 0 1 --list           what is done and what is left
    python -m bench.evidence --source DIR --epochs 20 --only original "original in PyTorch"

DIR holds pictures as ``--stage preprocess`` takes them. Every run goes through the real stages in processes of their
own: train to the end of the schedule, evaluate the last checkpoint with the centre view and with ten. The schedule is
the recipe's own, with its epochs scaled to ``--epochs``; its numbers are otherwise as they stand in
``pipeline/config.py``, but for the batch size, which is the same for all (``--batch``).

A run that was stopped goes on where it was, one that is done is not done again; a stopped run's checkpoint stays, a
finished run's weights are removed (``--keep`` keeps them). After each run ``evidence.json``, ``evidence.md`` and
``evidence.png`` in the output folder are written anew. ``--epochs`` and ``--batch`` are part of a run's folder name;
for other ``--set`` choose another ``--out``.
"""

from __future__ import annotations

import argparse
import datetime
import io
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final

from data.sampling import steps_per_epoch
from data.shards import read_manifest
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
ABOVE_CHANCE: Final = 0.05  # nats below ln(classes) from which on a run has left the plateau
_SMOOTH: Final = 5  # logged losses whose mean decides that


@dataclass(frozen=True)
class Planned:
    """One training run: a recipe with single settings changed, by hand or by PyTorch."""

    name: str
    recipe: str
    seed: int
    changes: tuple[str, ...] = ()
    torch: bool = False


def planned(base: str, seeds: Sequence[int]) -> list[Planned]:
    """All runs, the ones that say most first."""
    recipes: list[tuple[str, str, tuple[str, ...]]] = [
        ("original", "original", ()),
        ("seed", "seed", ()),
        ("seed without the last ReLU", "seed", ("network.final_relu=false",)),
        ("caffe", "caffe", ()),
        ("paper", "paper", ()),
    ]
    if base not in [name for name, _, _ in recipes]:
        recipes.insert(0, (base, base, ()))
    runs = [Planned(name, recipe, seed, changes) for seed in seeds for name, recipe, changes in recipes]
    ablations = [(f"{base} without {what}", changes) for what, changes, _ in ABLATIONS]
    runs += [Planned(name, base, seeds[0], changes) for name, changes in ablations]
    runs += [Planned(f"{base} in PyTorch", base, seed, torch=True) for seed in seeds]
    return runs + [Planned(name, base, seed, changes) for seed in seeds[1:] for name, changes in ablations]


def scaled(schedule: Schedule, factor: float) -> Schedule:
    """The schedule with its epochs multiplied and rounded up; of values that meet in one epoch the last counts."""
    return tuple({math.ceil(epoch * factor): value for epoch, value in schedule}.items())


def configured(run: Planned, epochs: int, batch: int, changes: Sequence[str] = ()) -> Config:
    """The run's complete configuration; ``changes`` are the command line's own settings."""
    config = override(RECIPES[run.recipe], None, [*run.changes, *changes], run.seed)
    train, inp = config.train, config.input
    factor = epochs / train.epochs
    train = replace(
        train,
        epochs=epochs,
        batch_size=batch,
        lr=scaled(train.lr, factor),
        bias_lr=scaled(train.bias_lr, factor),
        conv1_lr=scaled(train.conv1_lr, factor),
        log_every=5,
        keep_checkpoints=1,
    )
    if inp.jitter_epochs is not None:
        inp = replace(inp, jitter_epochs=math.ceil(inp.jitter_epochs * factor))
    return override(replace(config, train=train, input=inp))


def folder_of(out: Path, run: Planned, epochs: int, batch: int) -> RunDir:
    slug = "-".join(run.name.lower().split())
    return RunDir(out / f"{slug}-seed{run.seed}-{epochs}x{batch}")


# --- running -------------------------------------------------------------------------------------------------------


class Children:
    """Starts the stages one after another; one that is at work when this process is stopped saves first."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = number
        # Ctrl-C reaches the child by itself, and twice would be an order to stop without saving.
        if self._child is not None and number == signal.SIGTERM:
            self._child.terminate()

    def run(self, arguments: Sequence[str], log: Path) -> int:
        """Run ``python ARGUMENTS``, its output at the end of ``log``; returns the exit status."""
        with open(log, "ab") as file:
            file.write(f"$ python {' '.join(arguments)}\n".encode())
            file.flush()
            with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=file, stderr=file) as self._child:
                status = self._child.wait()
            self._child = None
        if self._stopped:
            raise SystemExit(128 + self._stopped)
        return status


def prepare(children: Children, source: Path, out: Path, changes: Sequence[str]) -> None:
    """Preprocess the pictures once; all runs share the shards. Quick where that has been done."""
    pictures = RunDir(out / "pictures")
    log = make_folder(out) / "preprocess.log"
    arguments = ["--stage", "preprocess", "--source", str(source), "--recipe", BASE, "--run", str(pictures.root)]
    settings = [part for change in changes for part in ("--set", change)]
    if children.run(["run_pipeline.py", *arguments, *settings], log) != 0:
        raise SystemExit(f"preprocessing failed; see {log}")


def carry_out(children: Children, run: Planned, config: Config, folder: RunDir, device: str, keep: bool) -> None:
    """Train and evaluate one run; writes ``result.json`` into its folder."""
    make_folder(folder.root)
    if not folder.preprocess.exists():
        folder.preprocess.symlink_to(Path("..") / "pictures" / "preprocess")
    write_sealed(folder.config, to_dict(config))
    log = folder.root / "log.txt"
    where = ["--run", str(folder.root)]
    stage = ["run_pipeline.py", *where, "--device", device, "--stage"]
    training = ["-m", "bench.evidence_torch", *where] if run.torch else [*stage, "train", "--resume"]
    if children.run(training, log) != 0:
        write_json(folder.root / "result.json", {**result(run, config, folder), "failed": _last_error(log)})
        return
    views = {}
    for count in (1, 10):
        if children.run([*stage, "eval", "--views", str(count)], log) != 0:
            raise SystemExit(f"the evaluation failed; see {log}")
        views[count] = read_json(folder.eval / "metrics.json", "evaluate again")
    made = {**result(run, config, folder), "centre": views[1], "ten_views": views[10]}
    if children.run([*stage, "report"], log) != 0:
        raise SystemExit(f"the report failed; see {log}")
    write_json(folder.root / "result.json", made)
    if not keep:
        for path in checkpoints(folder.train):
            path.unlink()


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1]).removeprefix("error: ")


# --- results -------------------------------------------------------------------------------------------------------


def result(run: Planned, config: Config, folder: RunDir) -> dict[str, Any]:
    """What a run's metrics say, finished or not."""
    manifest = read_manifest(folder)
    per_epoch = steps_per_epoch(manifest["splits"]["train"]["images"], config.train.batch_size)
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
        "epochs": config.train.epochs,
        "batch": config.train.batch_size,
        "classes": manifest["classes"],
        "training": [[round(x, 4), round(y, 5)] for x, y in steps],
        "validation": [
            [r["step"] / per_epoch, r["top1"], r["top5"], r["validation_loss"]] for r in records if "top1" in r
        ],
        "leaves_chance_after": leaves_chance(steps, manifest["classes"]),
        "images_per_second": round(statistics.median(rates), 1) if rates else None,
        "machine": machine(),
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


def machine() -> str:
    """The processor's name and the number of cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {os.cpu_count()} cores"


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
            _each(
                group, lambda r: f"{r['validation'][-1][0]:.3g} of {r['epochs']}" if r["validation"] else "0", same=True
            ),
            _each(group, lambda r: _percent(r, "centre", "top1")),
            _each(group, lambda r: _percent(r, "ten_views", "top1")),
            _each(group, lambda r: _percent(r, "ten_views", "top5")),
            _each(group, lambda r: f"{r['centre']['loss']:.3f}" if "centre" in r else _state(r)),
            _each(group, _takeoff),
            _each(group, lambda r: f"{r['images_per_second']}", same=True),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_ablations(groups, base), *_failures(results)]
    if results:
        lines += ["", f"Machine: {results[-1]['machine']}; {results[-1]['date']}; batch {results[-1]['batch']}."]
    return "\n".join(lines) + "\n"


def _ablations(groups: dict[str, list[dict[str, Any]]], base: str) -> list[str]:
    """Points of error that leaving something out costs, beside what others found on the full set."""
    whole = _mean_error(groups.get(base, []))
    if whole is None:
        return []
    rows = []
    for what, _, paper in ABLATIONS:
        error = _mean_error(groups.get(f"{base} without {what}", []))
        if error is not None:
            rows.append(f"| {what} | {error[0] - whole[0]:+.1f} | {error[1] - whole[1]:+.1f} | {paper} |")
    head = [
        f"What it costs to leave something out of {base}, in points of top-1 error, means over the seeds:",
        "",
        "| left out | centre | ten views | paper, authors' logs (ILSVRC, top-1 / top-5) |",
        "|---|---|---|---|",
    ]
    return [*head, *rows] if rows else []


def _mean_error(group: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    done = [r for r in group if "ten_views" in r]
    if not done:
        return None
    centre, ten = (statistics.mean(100 * (1 - r[view]["top1"]) for r in done) for view in ("centre", "ten_views"))
    return centre, ten


def _failures(results: Sequence[dict[str, Any]]) -> list[str]:
    failed = [r for r in results if "failed" in r]
    return ["", *(f"- {r['name']}, seed {r['seed']}: {r['failed']}" for r in failed)] if failed else []


def _each(group: Sequence[dict[str, Any]], text: Any, *, same: bool = False) -> str:
    values = [text(r) for r in group]
    return values[0] if same and len(set(values)) == 1 else " / ".join(values)


def _percent(r: dict[str, Any], view: str, key: str) -> str:
    return f"{100 * r[view][key]:.1f}" if view in r else _state(r)


def _state(r: dict[str, Any]) -> str:
    return "failed" if "failed" in r else "running"


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
        smooth = _epoch_means(r["training"])
        loss.plot([x for x, _ in smooth], [y for _, y in smooth], **look)
        first = next(other for other in results if other["name"] == r["name"]) is r
        accuracy.plot(
            [v[0] for v in r["validation"]],
            [v[1] for v in r["validation"]],
            label=r["name"] if first else None,
            **look,
        )
    loss.set(title="Training loss, mean of each epoch", xlabel="epoch", ylabel="nats", xlim=(0, None), ylim=(0, None))
    accuracy.set(title="Validation top-1, centre view", xlabel="epoch", xlim=(0, None), ylim=(0, 1))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (loss, accuracy):
        axes.grid(alpha=0.25)
    if results:
        figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    write_atomic(path, lambda out: out.write(file.getvalue()) and None)


def _epoch_means(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """A point an epoch, at its end."""
    epochs: dict[int, list[float]] = {}
    for x, y in points:
        epochs.setdefault(math.ceil(x), []).append(y)
    return [(float(epoch), statistics.mean(values)) for epoch, values in sorted(epochs.items())]


def collect(
    runs: Sequence[Planned], out: Path, epochs: int, batch: int, changes: Sequence[str]
) -> list[dict[str, Any]]:
    """The results of all runs that have begun, in the order of the plan."""
    found = []
    for run in runs:
        folder = folder_of(out, run, epochs, batch)
        path = folder.root / "result.json"
        if path.exists():
            found.append(read_json(path, "remove it, and it is made again"))
        elif (folder.train / "metrics.jsonl").exists():
            found.append(result(run, configured(run, epochs, batch, changes), folder))
    return found


def write_results(results: Sequence[dict[str, Any]], out: Path, base: str) -> None:
    write_json(out / "evidence.json", {"base": base, "runs": list(results)})
    write_atomic(out / "evidence.md", lambda file: file.write(markdown(results, base).encode()) and None)
    picture(results, out / "evidence.png")


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
    parser.add_argument("--keep", action="store_true", help="keep the weights of finished runs, 460 MB each")
    parser.add_argument("--list", action="store_true", help="show the plan and what is done of it, and run nothing")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    everything = planned(options.base, options.seeds)
    runs = [run for run in everything if not options.only or run.name in options.only]
    if unknown := set(options.only or ()) - {run.name for run in everything}:
        parser.error(f"no run is called {', '.join(sorted(unknown))}; --list shows the names")
    places = {run: folder_of(out, run, options.epochs, options.batch) for run in runs}

    def done(run: Planned) -> bool:
        path = places[run].root / "result.json"
        return path.exists() and "failed" not in read_json(path, "remove it")

    if options.list:
        for run in runs:
            print(f"{'done' if done(run) else 'left':5s} seed {run.seed}  {run.name}")
        return 0
    children = Children()
    if options.source is not None:
        prepare(children, options.source.resolve(), out, options.set)
    elif not (out / "pictures" / "preprocess" / "manifest.json").exists():
        parser.error("--source is needed the first time")

    def write() -> None:
        write_results(collect(everything, out, options.epochs, options.batch, options.set), out, options.base)

    for run in runs:
        if done(run):
            continue
        print(f"{datetime.datetime.now():%H:%M}  {run.name}, seed {run.seed}: {places[run].root}", flush=True)
        config = configured(run, options.epochs, options.batch, options.set)
        carry_out(children, run, config, places[run], options.device, options.keep)
        write()
    write()
    print((out / "evidence.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
