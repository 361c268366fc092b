"""The GPU backend beside PyTorch on the same card: training step, 10-view evaluation, the naive port.

    python -m bench.gpu                              all of it: bf16, tf32 and fp32, batches of 128 and 1024
    python -m bench.gpu --precision bf16 --minutes 8 --json gpu-bf16.json
    python -m bench.gpu --kernels                    every kernel of a step beside the prediction of bench.gpu_model
    python -m bench.gpu --curve 500 --precision fp32 loss curves of both from the same weights on the same batches
    python -m bench.gpu --resume                     stop, save, go on: the same bits as without stopping
    python -m bench.gpu --fed                        the rate with the loader's threads feeding it, pictures in memory
    python -m bench.gpu --sanitize                   the kernels under compute-sanitizer: memory, races, barriers
    python -m bench.gpu --dry-run                    on any machine: the same code on the CPU, in small

Contenders take turns: every round times a window of steps of each, from batches in pinned host memory to the device's
having finished, and the figures are medians over the rounds. PyTorch's best mode is the one compared with. Without a
GPU (``--dry-run``) our backend runs on the tests' stand-in and PyTorch on the CPU: the times mean nothing, but the
losses must agree.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bench import command, gpu_checks, gpu_model
from bench.gpu_checks import BORDER, SCALE, SEED, Host, batches, ours
from net.alexnet import alexnet
from net.backend import BackendUnavailableError, load
from net.network import initial_parameters, parameter_shapes
from pipeline.command_line import at_least_one

TARGET = 1.2  # ours / best PyTorch mode
DRY_CROP, CROP = 64, 224
VIEWS = 10
WHY_NAIVE_IS_SLOW = """\
  why the port is slow: each NumPy call becomes at least one launch with tens of microseconds of Python before it,
  hundreds a layer (one for each kernel offset and group); slices are copied before each product; temporaries go
  through memory between elementwise operations; the loops over pictures and the dropout key wait for the device."""


@dataclass(frozen=True)
class Figure:
    """One contender's result."""

    what: str  # "training step" or "10-view evaluation"
    contender: str
    precision: str
    batch: int
    images_per_second: float
    milliseconds: float  # median of a step
    spread: float  # (slowest - fastest) / median over the rounds
    first: float  # mean square of the first result: contenders that compute the same agree


@dataclass(frozen=True)
class Contender:
    name: str
    start: Callable[[], Callable[[Host], Any]]  # makes the step
    read: Callable[[Any], np.ndarray]
    wait: Callable[[], None]


@dataclass(frozen=True)
class Effort:
    """How long a race takes."""

    rounds: int
    window: int  # steps a round, at most
    seconds: float  # a contender's timed steps, at most: slow ones get fewer
    deadline: float  # of time.monotonic(): nobody starts after it


def contenders(
    ops: ModuleType, precision: str, host: Host, classes: int, keep: float, views: int, dry: bool, modes: str = ""
) -> list[Contender]:
    """Ours, every mode of PyTorch whose name has ``modes`` in it, and for training in fp32 the naive port."""

    def start_ours() -> Callable[[Host], Any]:
        return ours(ops, host, classes, keep, views=views)

    found = [Contender("ours", start_ours, ops.to_host, ops.synchronize)]
    found += [c for c in torch_contenders(precision, host, classes, keep, views, dry) if modes in c.name]
    if precision == "fp32" and not views:
        from bench import gpu_naive

        def start_naive() -> Callable[[Host], Any]:
            return ours(naive, host, classes, keep)

        naive = gpu_naive.load("numpy" if dry else "cupy")
        found.append(Contender("numpy replaced by cupy", start_naive, naive.to_host, ops.synchronize))
    return found


def torch_contenders(precision: str, host: Host, classes: int, keep: float, views: int, dry: bool) -> list[Contender]:
    try:
        import torch

        from bench import gpu_torch
    except ImportError:
        print("PyTorch is not installed (python -m pip install torch): nothing to compare with")
        return []
    if not dry and not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} sees no GPU (a build for CUDA is needed): nothing to compare with")
        return []
    device = "cpu" if dry else "cuda"
    gpu_torch.set_tf32(precision)
    wait = (lambda: None) if dry else torch.cuda.synchronize

    def starter(mode: Any) -> Callable[[], Callable[[Host], Any]]:
        if views:
            return lambda: gpu_torch.prediction(mode, precision, device, host, classes, SCALE, views)
        return lambda: gpu_torch.training(mode, precision, device, host, classes, keep, SCALE)

    modes = [m for m in gpu_torch.MODES if not (dry and m.compiled)]
    return [Contender(f"PyTorch {m.name}", starter(m), lambda t: t.float().cpu().numpy(), wait) for m in modes]


def race(
    what: str, runners: Sequence[Contender], precision: str, given: Sequence[Host], images: int, effort: Effort
) -> list[Figure]:
    """Time the contenders in turns; one that fails is reported and left out."""
    steps: dict[str, Callable[[Host], Any]] = {}
    losses: dict[str, float] = {}
    windows: dict[str, int] = {}
    for runner in runners:
        if time.monotonic() > effort.deadline:
            print(f"  {runner.name} is left out: the time is up")
            continue
        try:
            step = runner.start()
            losses[runner.name] = float(np.mean(runner.read(step(given[0])) ** 2))
            for batch in given[1:4]:  # compile, record, and settle the clocks
                step(batch)
            runner.wait()
            begin = time.perf_counter()
            step(given[0])
            runner.wait()
        except Exception as error:  # noqa: BLE001  whatever another's code raises, the others' figures are wanted
            print(f"  {runner.name} does not run: {_first_line(error)}")
            continue
        share = effort.seconds / effort.rounds / (time.perf_counter() - begin)
        steps[runner.name], windows[runner.name] = step, max(1, min(effort.window, int(share)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(effort.rounds):
        for runner in runners:
            if runner.name not in steps:
                continue
            try:
                runner.wait()
                begin = time.perf_counter()
                for number in range(windows[runner.name]):
                    steps[runner.name](given[number % len(given)])
                runner.wait()
            except Exception as error:  # noqa: BLE001
                print(f"  {runner.name} stops: {_first_line(error)}")
                del steps[runner.name], times[runner.name]
                continue
            times[runner.name].append((time.perf_counter() - begin) / windows[runner.name])
    figures = []
    for name, each in times.items():
        median = statistics.median(each)
        spread = (max(each) - min(each)) / median
        figures.append(Figure(what, name, precision, images, images / median, median * 1e3, spread, losses[name]))
    return figures


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def report(figures: Sequence[Figure]) -> list[str]:
    """Lines of one race: rates, and ours against PyTorch's best mode."""
    lines = []
    for f in sorted(figures, key=lambda f: f.milliseconds):
        numbers = f"{f.images_per_second:12,.1f} images/s {f.milliseconds:10.3f} ms, spread {f.spread:.0%}"
        lines.append(f"  {numbers}, first result {f.first:.6f}: {f.contender}")
    mine = next((f for f in figures if f.contender == "ours"), None)
    if mine and (ratio := ratio_to_best(figures)):
        lines.append(f"  ours / best PyTorch mode: {ratio:.2f} (target {TARGET})")
    if mine and mine.what == "training step":
        minutes = 90 * gpu_model.EPOCH / mine.images_per_second / 60
        lines.append(f"  90 epochs of ILSVRC at this rate: {minutes:,.0f} minutes")
    if any(f.contender.startswith("numpy") for f in figures):
        lines.append(WHY_NAIVE_IS_SLOW)
    return lines


def ratio_to_best(figures: Sequence[Figure]) -> float | None:
    """Our rate over that of PyTorch's best mode; None where one of them is missing."""
    mine = [f.milliseconds for f in figures if f.contender == "ours"]
    theirs = [f.milliseconds for f in figures if f.contender.startswith("PyTorch")]
    return min(theirs) / mine[0] if mine and theirs else None


def summary(figures: Sequence[Figure]) -> str:
    """One table of everything measured, as Markdown."""
    lines = [
        "| what | precision | batch | ours, images/s | best PyTorch mode, images/s | which | ratio | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for what, precision, batch in dict.fromkeys((f.what, f.precision, f.batch) for f in figures):
        race_of = [f for f in figures if (f.what, f.precision, f.batch) == (what, precision, batch)]
        mine = next((f"{f.images_per_second:,.0f}" for f in race_of if f.contender == "ours"), "-")
        theirs = [f for f in race_of if f.contender.startswith("PyTorch")]
        best = min(theirs, key=lambda f: f.milliseconds) if theirs else None
        ratio = ratio_to_best(race_of)
        rate, name = (f"{best.images_per_second:,.0f}", best.contender[8:]) if best else ("-", "-")
        shown = f"{ratio:.2f}" if ratio else "-"
        lines.append(f"| {what} | {precision} | {batch} | {mine} | {rate} | {name} | {shown} | {TARGET} |")
    return "\n".join(lines)


def report_dry(figures: Sequence[Figure], tolerance: float) -> list[str]:
    """Lines of one race whose times mean nothing: who ran, and that all computed the same.

    Raises
    ------
    SystemExit
        They did not.
    """
    values = ", ".join(f"{f.contender} {f.first:.6f}" for f in figures)
    found = [f.first for f in figures]
    if not all(abs(value - found[0]) <= tolerance * abs(found[0]) for value in found):
        raise SystemExit(f"bench.gpu: the contenders do not compute the same: {values}")
    return [f"  agree within {tolerance:.1%}: {values}"]


def curve(
    ops: ModuleType, host: Host, classes: int, steps: int, given: Sequence[Host], precision: str, dry: bool
) -> dict[str, Any]:
    """Losses of both over the same batches from the same weights, without dropout, whose masks differ."""
    runners = contenders(ops, precision, host, classes, 1.0, 0, dry)[:2]
    losses = {}
    for runner in runners:
        step = runner.start()
        queued = [step(given[n % len(given)]) for n in range(steps)]
        losses[runner.name] = [float(np.mean(runner.read(loss))) for loss in queued]
        print(f"  {runner.name}: {losses[runner.name][0]:.4f} -> {losses[runner.name][-1]:.4f}")
    if len(losses) == 2:
        a, b = (np.array(v) for v in losses.values())
        apart = np.abs(a - b) / np.abs(b)
        ends = f"{apart[0]:.2e} at the first, {apart[-1]:.2%} at the last"
        print(f"  relative difference: {ends}, at most {apart.max():.2%}, over {steps} steps")
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    dry = options.dry_run
    precisions = options.precision or ["bf16", "tf32", "fp32"]
    if options.sanitize:
        gpu_checks.sanitize(dry)
        return
    effort = Effort(
        rounds=options.rounds or (1 if dry else 9),
        window=options.window or (1 if dry else 30),
        seconds=6.0,
        deadline=time.monotonic() + 60 * options.minutes,
    )
    crop, classes = (DRY_CROP, 10) if dry else (CROP, 1000)
    side = crop + sum(BORDER)
    host = initial_parameters(parameter_shapes(alexnet(classes), (side, side, 3)), (0.0,) * 8, (0.0,) * 8, SEED)
    results: dict[str, Any] = {"machine": {}, "figures": []}
    measured: list[Figure] = []

    def keep(figures: Sequence[Figure]) -> None:
        """After each part, so that a command that is stopped leaves what it has."""
        measured.extend(figures)
        if figures:
            print(f"{figures[0].what}, {figures[0].precision}, batch {figures[0].batch}")
            tolerance = 1e-3 if figures[0].precision == "fp32" else 0.03
            print(*(report_dry(figures, tolerance) if dry else report(figures)), sep="\n", flush=True)
        results["machine"], results["figures"] = machine(dry), [asdict(f) for f in measured]
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")

    with ExitStack() as stack:
        if dry:
            from tests.gpu import standin

            stack.enter_context(standin.installed())
        for precision in precisions:
            try:
                ops = load("gpu", precision)
            except BackendUnavailableError as error:
                raise SystemExit(f"bench.gpu: {error}; python -m bench.gpu --dry-run works without a GPU") from error
            print(ops.describe(), flush=True)
            asked = False
            for found in checks(ops, host, classes, precision, crop, options, every=dry and precision == precisions[0]):
                asked = True
                results |= found
                keep([])
            if asked and not dry:  # instead
                continue
            for figures in races(ops, host, classes, precision, crop, options, effort):
                keep(figures)
        if dry:
            gpu_checks.sanitize(dry)
        elif measured:
            print(summary(measured))
    wrong = [name for name, value in results.items() if value is False]
    if wrong:
        raise SystemExit(f"bench.gpu: not so: {', '.join(wrong)}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command("gpu", __doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in small, without a GPU")
    parser.add_argument("--precision", nargs="+", choices=("bf16", "tf32", "fp32"), default=None)
    parser.add_argument("--batch", nargs="+", type=at_least_one, default=None)
    parser.add_argument("--rounds", type=at_least_one, default=None)
    parser.add_argument("--window", type=at_least_one, default=None, help="steps a round, at most")
    parser.add_argument("--modes", default="", metavar="PART", help="only PyTorch's modes with this in their names")
    parser.add_argument("--minutes", type=float, default=60.0, help="nothing new is started after so long")
    parser.add_argument("--kernels", action="store_true", help="time every kernel of a step instead")
    parser.add_argument("--curve", type=at_least_one, default=0, metavar="STEPS", help="compare loss curves instead")
    parser.add_argument("--resume", action="store_true", help="check that resuming gives the same bits instead")
    parser.add_argument("--fed", action="store_true", help="measure the rate with the loader's threads instead")
    parser.add_argument("--sanitize", action="store_true", help="run the kernels under compute-sanitizer instead")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    if options.json and not options.json.parent.is_dir():  # rather than when there are figures to write
        parser.error(f"--json: there is no folder {options.json.parent}")
    options.batch = options.batch or ([2] if options.dry_run else [128, 1024])
    return options


def checks(
    ops: ModuleType, host: Host, classes: int, precision: str, crop: int, options: argparse.Namespace, *, every: bool
) -> Iterator[dict[str, Any]]:
    """What was asked for instead of the races, and in a dry run (for its first precision: ``every``) all of it."""
    dry, sizes = options.dry_run, options.batch
    side = crop + sum(BORDER)
    if options.curve or dry:
        given = batches(8, sizes[0], crop, classes, ops.host_empty)
        yield {f"curve {precision}": curve(ops, host, classes, options.curve or 2, given, precision, dry)}
    if options.resume or every:
        given = batches(4, sizes[0], crop, classes, ops.host_empty)
        same = gpu_checks.resume(ops, host, classes, given, 2 if dry else 20)
        yield {f"resumed to the same bits {precision}": same}
    for images in sizes if options.kernels or every else ():
        given = batches(1, images, crop, classes, ops.host_empty)
        times = gpu_checks.kernel_times(ops, host, classes, given[0], precision, (side, side, 3), crop, dry)
        yield {f"kernels {precision} {images}": times}
    for images in sizes if options.fed or every else ():
        rate = gpu_checks.fed(ops, host, classes, images, crop, steps=4 if dry else 300, dry=dry)
        yield {f"fed by the loader {precision} {images}": rate}


def races(
    ops: ModuleType,
    host: Host,
    classes: int,
    precision: str,
    crop: int,
    options: argparse.Namespace,
    effort: Effort,
) -> Iterator[list[Figure]]:
    """The figures of a training step at each batch size, then those of the 10-view evaluation."""
    dry = options.dry_run
    for images in options.batch:
        given = batches(4, images, crop, classes, ops.host_empty)
        runners = contenders(ops, precision, host, classes, 1.0 if dry else 0.5, 0, dry, options.modes)
        yield race("training step", runners, precision, given, images, effort)
    crops = VIEWS if dry else 128 * VIEWS
    given = batches(4, crops, crop, classes, ops.host_empty)
    runners = contenders(ops, precision, host, classes, 1.0, VIEWS, dry, options.modes)
    yield race("10-view evaluation", runners, precision, given, crops, effort)


def machine(dry: bool) -> dict[str, str]:
    """What the figures were measured on."""
    found = {"python": platform.python_version(), "dry run": str(dry), "date": time.strftime("%Y-%m-%d")}
    for name in ("numpy", "cupy", "torch"):
        found[name] = str(getattr(sys.modules.get(name), "__version__", "not loaded"))
    if not dry and shutil.which("nvidia-smi"):  # containers may lack it
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        found["card"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found


if __name__ == "__main__":
    main()
