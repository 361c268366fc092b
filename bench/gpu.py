"""The GPU backend beside PyTorch on the same card: training step, 10-view evaluation, the naive port.

    python -m bench.gpu                              all of it: bf16 and tf32, batches of 128 and 1024
    python -m bench.gpu --precision bf16 --batch 128 --json out.json
    python -m bench.gpu --curve 500                  loss curves of both from the same weights on the same batches
    python -m bench.gpu --loader RUN                 the rate with the real loader feeding it, from RUN's shards
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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from net.alexnet import alexnet
from net.backend import BackendUnavailableError, load
from net.layers import fuse
from net.network import Descent, Preparation, initial_parameters, parameter_shapes, prediction, training_step

Host = dict[str, np.ndarray]
SCALE, BORDER, SEED = 1 / 255, (2, 1), 1
TARGET = 1.2  # ours / best PyTorch mode
EPOCH = 1_281_167  # pictures of ILSVRC-2012's training set
DRY_CROP, CROP = 64, 224


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


def batches(count: int, images: int, crop: int, classes: int, empty: Callable[..., np.ndarray]) -> list[Host]:
    """Random batches in the buffers the loader would use."""
    made = []
    for number in range(count):
        random = np.random.default_rng(number)
        values = {
            "images": random.integers(0, 256, (images, crop, crop, 3), dtype=np.uint8),
            "corner": np.zeros((images, 2), np.int32),
            "flip": random.integers(0, 2, images).astype(np.uint8),
            "shift": random.standard_normal((images, 3), dtype=np.float32),
            "labels": random.integers(0, classes, images).astype(np.int32),
            "rates": np.full(16, 1e-3, np.float32),
            "step": np.array([number], np.uint64),
        }
        pinned = {name: empty(a.shape, a.dtype) for name, a in values.items()}
        for name, a in values.items():
            pinned[name][...] = a
        made.append(pinned)
    return made


def ours(ops: ModuleType, host: Host, classes: int, keep: float, *, views: int = 0) -> Callable[[Host], Any]:
    """Our training step, or prediction where ``views`` is given, as a function of a batch in host memory."""
    layers = alexnet(classes, dropout_keep=keep)
    parameters = {name: ops.asarray(a) for name, a in host.items()}
    prepared = Preparation(None, SCALE, False, BORDER)
    fused = fuse(layers, ops)
    if views:
        predict = prediction(ops, fused, parameters, prepared, views)
        names = ("images", "corner", "flip", "shift")
        return lambda batch: predict(ops.upload({name: batch[name] for name in names}))
    momenta = {name: ops.asarray(np.zeros_like(a)) for name, a in host.items()}
    descent = Descent(0.9, dict.fromkeys(host, 5e-4))
    step = training_step(ops, fused, parameters, momenta, prepared, descent, SEED)
    return lambda batch: step(ops.upload(batch))


def contenders(ops: ModuleType, precision: str, host: Host, classes: int, keep: float, views: int, dry: bool) -> list:
    """Ours, every mode of PyTorch, and for training in fp32 the naive port."""

    def start_ours() -> Callable[[Host], Any]:
        return ours(ops, host, classes, keep, views=views)

    found = [Contender("ours", start_ours, ops.to_host, ops.synchronize)]
    found += _torch_contenders(precision, host, classes, keep, views, dry)
    if precision == "fp32" and not views:
        from bench import gpu_naive

        naive = gpu_naive.load("numpy" if dry else "cupy")
        name = "numpy replaced by cupy"
        found.append(Contender(name, lambda: ours(naive, host, classes, keep), naive.to_host, ops.synchronize))
    return found


def _torch_contenders(precision: str, host: Host, classes: int, keep: float, views: int, dry: bool) -> list[Contender]:
    try:
        import torch

        from bench import gpu_torch
    except ImportError:
        print("PyTorch is not installed (python -m pip install torch): nothing to compare with")
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
    what: str,
    runners: Sequence[Contender],
    precision: str,
    given: Sequence[Host],
    images: int,
    rounds: int,
    window: int,
) -> list[Figure]:
    """Time the contenders in turns; one that fails is reported and left out."""
    steps: dict[str, Callable[[Host], Any]] = {}
    losses: dict[str, float] = {}
    for runner in runners:
        try:
            steps[runner.name] = step = runner.start()
            losses[runner.name] = float(np.mean(runner.read(step(given[0])) ** 2))
            for batch in given[1:4]:  # compile, record, and settle the clocks
                step(batch)
            runner.wait()
        except (RuntimeError, MemoryError, ImportError, TypeError, AttributeError, ValueError) as error:
            steps.pop(runner.name, None)
            print(f"  {runner.name} does not run: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for runner in runners:
            if runner.name not in steps:
                continue
            runner.wait()
            begin = time.perf_counter()
            for number in range(window):
                steps[runner.name](given[number % len(given)])
            runner.wait()
            times[runner.name].append((time.perf_counter() - begin) / window)
    figures = []
    for name, each in times.items():
        median = statistics.median(each)
        spread = (max(each) - min(each)) / median
        figures.append(Figure(what, name, precision, images, images / median, median * 1e3, spread, losses[name]))
    return figures


def report(figures: Sequence[Figure]) -> list[str]:
    """Lines of one race: rates, and ours against PyTorch's best mode."""
    lines = []
    for f in sorted(figures, key=lambda f: f.milliseconds):
        numbers = f"{f.images_per_second:12,.1f} images/s {f.milliseconds:10.3f} ms, spread {f.spread:.0%}"
        lines.append(f"  {numbers}, first result {f.first:.6f}: {f.contender}")
    mine = next((f for f in figures if f.contender == "ours"), None)
    theirs = [f for f in figures if f.contender.startswith("PyTorch")]
    if mine and theirs:
        ratio = min(f.milliseconds for f in theirs) / mine.milliseconds
        lines.append(f"  ours / best PyTorch mode: {ratio:.2f} (target {TARGET})")
    if mine and mine.what == "training step":
        lines.append(f"  90 epochs of ILSVRC at this rate: {90 * EPOCH / mine.images_per_second / 60:,.0f} minutes")
    return lines


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
) -> dict:
    """Losses of both over the same batches from the same weights, without dropout, whose masks differ."""
    runners = contenders(ops, precision, host, classes, 1.0, 0, dry)[:2]
    losses = {}
    for runner in runners:
        step = runner.start()
        losses[runner.name] = [float(np.mean(runner.read(step(given[n % len(given)])))) for n in range(steps)]
        print(f"  {runner.name}: {losses[runner.name][0]:.4f} -> {losses[runner.name][-1]:.4f}")
    if len(losses) == 2:
        a, b = (np.array(v) for v in losses.values())
        print(f"  largest relative difference {np.max(np.abs(a - b) / np.abs(b)):.2%} over {steps} steps")
    return losses


def loader_command(run: str, steps: int, precision: str) -> list[str]:
    """The pipeline's own training, whose metrics.jsonl then has the rate and the share of time waiting for data."""
    return [
        *(sys.executable, "run_pipeline.py", "--stage", "train", "--run", run, "--resume"),
        *("--device", "gpu", "--precision", precision, "--steps", str(steps)),
    ]


def loader_rate(run: str, steps: int, precision: str) -> None:
    subprocess.run(loader_command(run, steps, precision), check=True)
    lines = [json.loads(line) for line in (Path(run) / "train" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line][1:]
    waits = [line["data_wait"] for line in lines if "data_wait" in line][1:]
    rate = statistics.median(rates)
    print(f"fed by the loader: {rate:,.0f} images/s, {statistics.median(waits):.1%} of the time waiting for data")
    print(f"90 epochs of ILSVRC at this rate: {90 * EPOCH / rate / 60:,.0f} minutes")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in small, without a GPU")
    parser.add_argument("--precision", nargs="+", choices=("bf16", "tf32", "fp32"), default=None)
    parser.add_argument("--batch", nargs="+", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--window", type=int, default=None, help="steps a round")
    parser.add_argument("--curve", type=int, default=0, metavar="STEPS", help="compare loss curves instead")
    parser.add_argument("--loader", metavar="RUN", help="measure the rate with RUN's shards instead")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    dry = options.dry_run
    precisions = options.precision or ["bf16", "tf32", "fp32"]
    sizes = options.batch or ([2] if dry else [128, 1024])
    rounds, window = options.rounds or (1 if dry else 9), options.window or (1 if dry else 30)
    if options.loader:
        if dry:
            print("would run:", " ".join(loader_command(options.loader, 400, precisions[0])))
        else:
            loader_rate(options.loader, 400, precisions[0])
        return
    crop, classes = (DRY_CROP, 10) if dry else (CROP, 1000)
    side = crop + sum(BORDER)
    with ExitStack() as stack:
        if dry:
            from tests.gpu import standin

            stack.enter_context(standin.installed())
        results: dict[str, Any] = {"machine": _machine(dry), "figures": []}

        def finish(figures: Sequence[Figure]) -> None:
            results["figures"] += [asdict(f) for f in figures]
            if figures:
                print(f"{figures[0].what}, {figures[0].precision}, batch {figures[0].batch}")
                tolerance = 1e-3 if figures[0].precision == "fp32" else 0.03
                print(*(report_dry(figures, tolerance) if dry else report(figures)), sep="\n")

        shapes = parameter_shapes(alexnet(classes), (side, side, 3))
        host = initial_parameters(shapes, (0.0,) * 8, (0.0,) * 8, SEED)
        for precision in precisions:
            try:
                ops = load("gpu", precision)
            except BackendUnavailableError as error:
                raise SystemExit(f"bench.gpu: {error}; python -m bench.gpu --dry-run works without a GPU") from error
            print(ops.describe())
            if options.curve:
                given = batches(8, sizes[0], crop, classes, ops.host_empty)
                results[f"curve {precision}"] = curve(ops, host, classes, options.curve, given, precision, dry)
                continue
            for images in sizes:
                given = batches(4, images, crop, classes, ops.host_empty)
                runners = contenders(ops, precision, host, classes, 1.0 if dry else 0.5, 0, dry)
                figures = race("training step", runners, precision, given, images, rounds, window)
                finish(figures)
            crops = 10 if dry else 1280
            given = batches(4, crops, crop, classes, ops.host_empty)
            runners = contenders(ops, precision, host, classes, 1.0, 10, dry)
            figures = race("10-view evaluation", runners, precision, given, crops, rounds, window)
            finish(figures)
        if dry:
            print("would run:", " ".join(loader_command("RUN", 400, precisions[0])))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def _machine(dry: bool) -> dict[str, str]:
    """What the figures were measured on."""
    found = {"python": platform.python_version(), "dry run": str(dry), "date": time.strftime("%Y-%m-%d")}
    for name in ("numpy", "cupy", "torch"):
        found[name] = str(getattr(sys.modules.get(name), "__version__", "not loaded"))
    if not dry:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        found["card"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found


if __name__ == "__main__":
    main()
