"""The parts of ``bench.gpu`` beside the races: kernel times, resuming, the loader, compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from types import ModuleType
from typing import Any, Final
from unittest import mock

import numpy as np

from bench import gpu_model
from bench.gpu_model import EPOCH
from data.loader import load as load_batches
from data.sampling import Augmentation, Crops, training_crops
from net.alexnet import alexnet
from net.layers import fuse
from net.network import Descent, Preparation, prediction, training_step

Host = dict[str, np.ndarray]
SCALE, BORDER, SEED = 1 / 255, (2, 1), 1
SANITIZER_SECONDS: Final = 155  # of each checker; the three end before line 5 of docs/gpu.md is cut off
STORED: Final = 256  # side of a stored picture


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
    if not views:
        step, *_ = training(ops, host, classes, keep)
        return lambda batch: step(ops.upload(batch))
    parameters = {name: ops.asarray(a) for name, a in host.items()}
    fused = fuse(alexnet(classes, dropout_keep=keep), ops)
    predict = prediction(ops, fused, parameters, Preparation(None, SCALE, False, BORDER), views)
    names = ("images", "corner", "flip", "shift")
    return lambda batch: predict(ops.upload({name: batch[name] for name in names}))


def training(
    ops: ModuleType, host: Host, classes: int, keep: float, momenta: Host | None = None
) -> tuple[Callable[[dict[str, Any]], Any], dict[str, Any], dict[str, Any]]:
    """Our training step as a function of device arrays, and the parameters and momenta it changes."""
    parameters = {name: ops.asarray(a) for name, a in host.items()}
    speeds = {name: ops.asarray(np.zeros_like(a) if momenta is None else momenta[name]) for name, a in host.items()}
    fused = fuse(alexnet(classes, dropout_keep=keep), ops)
    descent = Descent(0.9, dict.fromkeys(host, 5e-4))
    prepared = Preparation(None, SCALE, False, BORDER)
    return training_step(ops, fused, parameters, speeds, prepared, descent, SEED), parameters, speeds


# --- every kernel --------------------------------------------------------------------------------------------------


def kernel_times(
    ops: ModuleType,
    host: Host,
    classes: int,
    batch: Host,
    precision: str,
    shape: tuple[int, int, int],
    crop: int,
    dry: bool,
) -> list[dict[str, Any]]:
    """Time every kernel of a training step and print it beside the model's prediction."""
    from net.gpu.device import current

    times = _times(ops, host, classes, batch, dry)
    card = _card(current())
    setting = gpu_model.Setting(card, precision, len(batch["labels"]))
    modelled = gpu_model.training_step(alexnet(classes), shape, crop, setting)
    if [name for name, _ in times] != [kernel.name for kernel in modelled]:
        print("the model's kernels are not those of the step (tests/gpu/test_model.py); measured alone, microseconds")
        for name, microseconds in times:
            print(f"  {name:22s} {microseconds:9.1f}")
        return [{"kernel": name, "measured us": round(microseconds, 1)} for name, microseconds in times]
    rows = [
        {
            "layer": kernel.layer,
            "kernel": kernel.name,
            "predicted us": round(kernel.seconds(card, precision) * 1e6, 1),
            "measured us": round(microseconds, 1),
            "MB": round(kernel.bytes / 1e6, 1),
            "GFLOP": round(kernel.products / 1e9, 1),
        }
        for kernel, (_, microseconds) in zip(modelled, times, strict=True)
    ]
    print(f"every kernel, {precision}, batch {setting.batch}: predicted for {card.name} and measured, microseconds")
    if not dry:
        for row in rows:
            place = f"{row['layer']:9s} {row['kernel']:22s}"
            print(f"  {place} {row['predicted us']:9.1f} {row['measured us']:9.1f} {row['MB']:9.1f} MB")
    layers = dict.fromkeys(kernel.layer for kernel in modelled)
    by_layer = {layer: [row for row in rows if row["layer"] == layer] for layer in layers}
    for title, own in [*by_layer.items(), ("together", rows)]:
        told, took = (sum(row[key] for row in own) for key in ("predicted us", "measured us"))
        print(f"  {title:9s} {len(own):3d} kernels {told:9.1f} {took:9.1f}", flush=True)
    return rows


def _times(ops: ModuleType, host: Host, classes: int, batch: Host, dry: bool) -> list[tuple[str, float]]:
    """The kernels of a step in their order, and the median microseconds of each.

    The step runs unrecorded, with an event after each kernel. Recorded steps queued before it keep the device busy
    while Python queues, so that no kernel waits for Python; the events add about a microsecond each.
    """
    from net.gpu.device import current

    device = current()
    plain = ModuleType("net.gpu without recording")
    vars(plain).update({name: getattr(ops, name) for name in ops.__all__ if name != "replayable"})
    recorded, *_ = training(ops, host, classes, 0.5)
    step, *_ = training(plain, host, classes, 0.5)
    inputs = ops.upload(batch)
    for _ in range(3):
        recorded(inputs)
    step(inputs)
    ops.synchronize()
    begin = time.perf_counter()
    recorded(inputs)
    ops.synchronize()
    ahead = 1 if dry else ceil(0.05 / (time.perf_counter() - begin))  # 50 ms: Python needs a few to queue a step
    marks: list[tuple[str, Any]] = []

    def mark(name: str) -> None:
        event = device.cupy.cuda.Event()
        event.record(device.stream)
        marks.append((name, event))

    rounds: list[list[float]] = []
    with _marking(mark):
        for _ in range(1 if dry else 7):
            marks.clear()
            for _ in range(ahead):
                recorded(inputs)
            mark("start")
            step(inputs)
            ops.synchronize()
            elapsed = device.cupy.cuda.get_elapsed_time
            rounds.append([elapsed(a, b) * 1e3 for (_, a), (_, b) in pairwise(marks)])
    medians = [statistics.median(each) for each in zip(*rounds, strict=True)]
    return list(zip([name for name, _ in marks[1:]], medians, strict=True))


@contextmanager
def _marking(mark: Callable[[str], None]) -> Iterator[None]:
    """Call ``mark`` with the name of each kernel after it has been queued."""
    from net.gpu import cublas, kernels

    compiled, multiply = kernels.compiled, cublas.multiply

    def marked_kernel(file: str, name: str, real: str) -> Callable[..., None]:
        kernel = compiled(file, name, real)

        def call(*arguments: Any, **options: Any) -> None:
            kernel(*arguments, **options)
            mark(name)

        call.max_dynamic_shared_size_bytes = kernel.max_dynamic_shared_size_bytes  # type: ignore[attr-defined]
        return call

    def marked_product(*arguments: Any, **options: Any) -> None:
        multiply(*arguments, **options)
        mark("product")

    with mock.patch.object(kernels, "compiled", marked_kernel), mock.patch.object(cublas, "multiply", marked_product):
        yield


def _card(device: Any) -> gpu_model.Card:
    """The model's card that the driver's name means, the H100 where none is, as this device has it built.

    Which kernels a step launches depends on the number of multiprocessors and their memory.
    """
    short = [(card.name.split()[-1] if "RTX" in card.name else card.name.split()[0], card) for card in gpu_model.CARDS]
    card = next((card for word, card in short if word in device.name), gpu_model.H100)
    return replace(card, processors=device.processors, shared_processor=device.shared_processor, memory=device.memory)


# --- resuming ------------------------------------------------------------------------------------------------------


def resume(ops: ModuleType, host: Host, classes: int, given: list[Host], steps: int) -> bool:
    """Twice ``steps`` steps at once, and with the state taken to the host and back in the middle: the same bits?"""

    def run(step: Callable[..., Any], numbers: range) -> list[np.ndarray]:
        losses = []
        for number in numbers:
            batch = given[number % len(given)] | {"step": np.array([number], np.uint64)}
            losses.append(ops.to_host(step(ops.upload(batch))))
        return losses

    step, parameters, speeds = training(ops, host, classes, 0.5)
    whole = run(step, range(2 * steps))
    ended = {name: ops.to_host(a) for name, a in parameters.items()}
    step, parameters, speeds = training(ops, host, classes, 0.5)
    parts = run(step, range(steps))
    saved = [{name: ops.to_host(a) for name, a in state.items()} for state in (parameters, speeds)]
    step, parameters, speeds = training(ops, saved[0], classes, 0.5, saved[1])
    parts += run(step, range(steps, 2 * steps))
    wrong = [name for name, a in parameters.items() if ops.to_host(a).tobytes() != ended[name].tobytes()]
    if wrong or np.stack(whole).tobytes() != np.stack(parts).tobytes():
        print(f"  RESUMING GIVES OTHER BITS, in {', '.join(wrong) or 'the losses'}", flush=True)
        return False
    print(f"  resumed after {steps} of {2 * steps} steps: the same bits in all weights and losses", flush=True)
    return True


# --- the loader ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InMemory:
    """Pictures as a split has them, without files: what the loader's threads and the way to the GPU can do at most."""

    images: np.ndarray  # uint8 (N, size, size, 3)
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def row(self, index: int) -> np.ndarray:
        return self.images[index]


def fed(
    ops: ModuleType, host: Host, classes: int, images: int, crop: int, *, steps: int, dry: bool
) -> dict[str, float | int]:
    """Train with the loader's threads cutting random crops out of pictures in memory, more than any cache holds.

    Needs what the loader and its settings import: Numba and h5py, which the rest of this module does without.
    """
    try:
        from data import kernels  # noqa: F401
        from pipeline.config import SEED as RECIPE
        from stages.setup import loader_slots, loader_threads
    except ImportError as error:
        print(f"the rate with the loader is left out: {error}")
        return {}
    count, size = (8, crop + 8) if dry else (16384, STORED)
    threads = 2 if dry else loader_threads(RECIPE, ops, images)
    random = np.random.default_rng(0)
    pictures = np.empty((count, size, size, 3), np.uint8)
    some = random.integers(0, 256, (min(count, 256), size, size, 3), dtype=np.uint8)
    for first in range(0, count, len(some)):
        pictures[first : first + len(some)] = some[: count - first]
    labels = random.integers(0, classes, count).astype(np.int32)
    how = Augmentation(size=size, crop=crop, random_crop=True, flip=True, jitter=0.1, directions=np.eye(3))
    per_epoch = count // images

    def plan(number: int) -> Crops:
        epoch, place = divmod(number, per_epoch)
        order = np.random.default_rng(epoch).permutation(count)
        return training_crops(order, place * images, (place + 1) * images, SEED, epoch, how)

    step, *_ = training(ops, host, classes, 0.5)
    rates = np.full(16, 1e-3, np.float32)
    slots = loader_slots(RECIPE, threads)
    options = {"crop": crop, "largest": images, "slots": slots, "threads": threads, "allocate": ops.host_empty}
    waited, begin, warm = 0.0, 0.0, steps // 4
    with closing(load_batches(InMemory(pictures, labels), plan, range(steps), **options)) as loader:
        for batch in loader:
            if batch.number == warm:
                ops.synchronize()
                waited, begin = 0.0, time.perf_counter()
            step(ops.upload({**batch.arrays, "rates": rates, "step": np.array([batch.number], np.uint64)}))
            waited += batch.waited
        ops.synchronize()
    seconds = time.perf_counter() - begin
    rate = images * (steps - warm) / seconds
    print(
        f"fed by {threads} loader threads from memory, batch {images}: {rate:,.0f} images/s, "
        f"{waited / seconds:.1%} of the time waiting for data; 90 epochs of ILSVRC: {90 * EPOCH / rate / 60:,.0f} "
        "minutes where the storage delivers as fast",
        flush=True,
    )
    return {"threads": threads, "images_per_second": rate, "data_wait": waited / seconds}


# --- compute-sanitizer ---------------------------------------------------------------------------------------------


def sanitize(dry: bool) -> None:
    """Every kernel on small inputs under compute-sanitizer's checkers.

    Raises
    ------
    SystemExit
        A checker found something, or compute-sanitizer is not there.
    """
    found = []
    for tool in ("memcheck", "racecheck", "synccheck"):
        checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        command = [*checker, sys.executable, "-m", "tests.gpu.sanitized", "card"]
        if dry:
            print("would run:", " ".join(command))
            continue
        if shutil.which(command[0]) is None:
            raise SystemExit("bench.gpu: compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
        begin = time.perf_counter()
        try:
            status, said = _run_group(command, SANITIZER_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"{tool}: not finished after {SANITIZER_SECONDS} s", flush=True)
            found.append(tool)
            continue
        clean = status == 0
        print(f"{tool}: {'clean' if clean else 'NOT CLEAN'} in {time.perf_counter() - begin:.0f} s", flush=True)
        if not clean:
            print(said[-4000:])
            found.append(tool)
    if found:
        raise SystemExit(f"bench.gpu: {', '.join(found)} found something or did not finish")


def _run_group(command: list[str], seconds: float) -> tuple[int, str]:
    """Exit status and output of a command that is ended with all that it has started.

    The checker starts Python as a program of its own, which would go on beside the next checker's.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said
