"""Training shared by several processes: what is measured on this machine, and what is predicted for GPUs.

    python -m bench.scaling            weak and strong scaling: one core, one process with two threads, two ranks
    python -m bench.scaling --model    8 GPUs in a box, and 8 boxes with 400 Gb/s between them

Measured: training steps of the full network (227x227, 1000 classes, random pictures; no loader) after two that are not
counted. A step's time is that of the slowest rank, the table gives medians. Each setting is a process, or two under
mpiexec, of its own. "Without exchange" is the same ranks with their sums left out, "exchange alone" the same messages
with nothing to compute; what the exchange adds to a step is exposed, the rest of it is hidden.

Predicted: each layer's kernels by ``bench.gpu_model``; a message starts when its gradient is known and the one before
has been sent, and the updates start when all are there. The bandwidths are data sheets' times judgement. Not in it:
the launches from Python that a recorded graph saves a single GPU and that ranks do not have.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench import command
from pipeline.command_line import at_least_one

CLASSES: Final = 1000
SKIPPED: Final = 2


# --- measured ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What one row measures: so many ranks with so many threads, pictures in a step, and which part of it."""

    name: str
    ranks: int
    threads: int
    batch: int
    part: str = "step"  # "step", "without exchange" or "exchange alone"


def settings(batch: int) -> list[Setting]:
    return [
        Setting("one core", 1, 1, batch),
        Setting("one process, two threads", 1, 2, batch),
        Setting("strong: two ranks share the batch", 2, 1, batch),
        Setting("the same without exchange", 2, 1, batch, "without exchange"),
        Setting("one process, two threads", 1, 2, 2 * batch),
        Setting("weak: two ranks with a batch each", 2, 1, 2 * batch),
        Setting("the same without exchange", 2, 1, 2 * batch, "without exchange"),
        Setting("exchange alone", 2, 1, 2 * batch, "exchange alone"),
    ]


def measure(setting: Setting, rounds: int) -> float:
    """Seconds a step, the median of ``rounds``."""
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "bench.scaling", "--worker", setting.part, "--batch", str(setting.batch)]
    command += ["--rounds", str(rounds)]
    if setting.ranks > 1:
        mpiexec = Path(sys.executable).with_name("mpiexec")
        command = [str(mpiexec), "-n", str(setting.ranks), "-bind-to", "core", *command]
    else:
        command = ["taskset", "-c", ",".join(map(str, cores[: setting.threads])), *command]
    threads = {name: str(setting.threads) for name in ("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    done = subprocess.run(command, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, check=True)
    return statistics.median(json.loads(done.stdout.splitlines()[-1]))


def worker(part: str, batch: int, rounds: int) -> None:
    """One rank of a setting; the first prints the seconds of each step."""
    from pipeline.mpi import joined

    with joined() as ranks:
        step = _exchange() if part == "exchange alone" else _step(part, batch)
        times = []
        for number in range(SKIPPED + rounds):
            ranks.wait()
            start = time.perf_counter()
            step(ranks, number)
            took = np.array([time.perf_counter() - start])
            if number >= SKIPPED:
                times.append(float(ranks.gather(took).max()))
        print(json.dumps(times), flush=True)


def _step(part: str, batch: int) -> Callable[[Any, int], None]:
    from bench.blotches import batches
    from bench.hand import begin
    from net.backend import load
    from net.network import initial_parameters
    from pipeline.config import PAPER
    from stages.setup import learning_rates, network_layers, shapes

    ops = load("cpu")
    sizes = shapes(network_layers(PAPER, CLASSES), PAPER)
    start = initial_parameters(sizes, (0.0,) * 8, PAPER.network.bias, seed=0)
    mean = np.zeros((256, 256, 3), dtype=np.float32)
    made: list[Any] = []

    def step(ranks: Any, number: int) -> None:
        if not made:
            first, last = ranks.part(batch)
            inputs = next(batches(PAPER, CLASSES, last - first, 1, seed=ranks.rank))
            inputs |= {
                "rates": learning_rates(PAPER, list(start), 0) * np.float32(1e-3),
                "step": np.zeros(1, np.uint64),
            }
            reduce = None
            if ranks.size > 1:
                inputs |= {"first": np.array([first], np.uint64), "share": np.array([1 / ranks.size], np.float32)}
                reduce = ranks.reduce if part == "step" else iter
            made.extend((inputs, begin(ops, PAPER, CLASSES, start, mean, reduce=reduce).step))
        made[1](ops.upload(made[0]))

    return step


def _exchange() -> Callable[[Any, int], None]:
    from pipeline.config import PAPER
    from stages.setup import network_layers, shapes

    sizes = shapes(network_layers(PAPER, CLASSES), PAPER)
    gradients = [(name, np.zeros(sizes[name], np.float32)) for name in _backwards(sizes)]

    def step(ranks: Any, number: int) -> None:
        for _ in ranks.reduce(gradients):
            pass

    return step


def _backwards(names: Any) -> list[str]:
    """fc8.w, fc8.b, fc7.w, ...: the order in which the backward pass hands gradients out."""
    order = list(names)
    return [name for i in range(len(order) - 2, -1, -2) for name in order[i : i + 2]]


def measured(batch: int, rounds: int) -> str:
    lines = ["| | ranks x threads | batch | s a step | images/s | to one core |", "|---|---|---|---|---|---|"]
    seconds: dict[tuple[int, str], float] = {}
    one = 0.0
    for s in settings(batch):
        took = measure(s, rounds)
        rate = s.batch / took
        one = one or rate
        if s.ranks > 1:
            seconds[s.batch, s.part] = took
        figures = "" if s.part == "exchange alone" else f"{rate:.1f} | {rate / one:.2f}"
        lines.append(f"| {s.name} | {s.ranks} x {s.threads} | {s.batch} | {took:.3f} | {figures or ' | '} |")
        print(lines[-1], file=sys.stderr, flush=True)
    alone = seconds[2 * batch, "exchange alone"]
    lines.append("")
    for size in (batch, 2 * batch):
        whole = seconds[size, "step"]
        exposed = max(0.0, whole - seconds[size, "without exchange"])
        lines.append(
            f"Batch {size}: the exchange takes {alone:.3f} s on its own, {alone / whole:.1%} of the step's {whole:.3f} "
            f"s; exposed {exposed:.3f} s ({exposed / whole:.1%}), hidden {max(0.0, alone - exposed):.3f} s."
        )
    return "\n".join(lines)


# --- predicted -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    """Bandwidths in bytes a second and one way, and seconds a message takes beside them."""

    gpus: int  # in a box
    boxes: int
    inside: float  # each GPU's link
    outside: float  # each box's link
    latency: float

    def seconds(self, size: float) -> float:
        """All-reduce of ``size`` bytes: reduce-scatter in the box, a ring of boxes, all-gather in the box."""
        inside = 2 * (self.gpus - 1) / self.gpus * size / self.inside
        outside = 2 * (self.boxes - 1) / self.boxes * size / self.outside
        return inside + outside + self.latency


# NVLink 4 has 450 GB/s one way, PCIe 5 x16 64 GB/s, 400 Gb/s are 50 GB/s; of each, a share that large messages reach.
NVLINK, PCIE, LINK = 0.8 * 450e9, 0.6 * 64e9, 0.9 * 50e9
NETS: Final = {
    "8 GPUs, NVLink": Net(8, 1, NVLINK, LINK, 30e-6),
    "8 GPUs, PCIe 5": Net(8, 1, PCIE, LINK, 50e-6),
    "8 boxes of 8, NVLink, 400 Gb/s a box": Net(8, 8, NVLINK, LINK, 80e-6),
}


def timeline(batch: int, net: Net, item: int) -> tuple[float, float, float]:
    """Seconds of a step on one GPU, of its messages, and that these add; ``item`` is bytes a number of a gradient."""
    from bench.gpu_model import CROP, H200, LAYERS, SHAPE, training_step
    from bench.gpu_model import Setting as Card
    from net.network import parameter_shapes

    s = Card(H200, "bf16", batch)
    sizes = parameter_shapes(LAYERS, SHAPE)
    kernels = training_step(LAYERS, SHAPE, CROP, s)
    step = sum(k.seconds(s.card, s.precision) for k in kernels)
    now = sent = messages = 0.0
    known: list[str] = []
    following = [*kernels[1:], None]
    for kernel, after in zip(kernels, following, strict=True):
        if kernel.layer == "update":
            continue
        now += kernel.seconds(s.card, s.precision)
        # Its update comes next: the layer's gradients are known.
        if after is not None and after.layer == "update":
            known.append(kernel.layer)
            size = sum(int(np.prod(sizes[f"{kernel.layer}.{kind}"])) for kind in "wb") * item
            took = net.seconds(size)
            sent, messages = max(sent, now) + took, messages + took
    assert len(known) == len(sizes) // 2
    return step, messages, max(0.0, sent - now)


def predicted() -> Iterator[str]:
    yield "| machine | gradients | a GPU | in all | step, ms | exchange, ms | exposed, ms | images/s | efficiency |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, net in NETS.items():
        gpus = net.gpus * net.boxes
        for item, kind in ((4, "fp32"), (2, "bf16")):
            for batch in (16, 128, 512, 1024):
                step, messages, exposed = timeline(batch, net, item)
                rate = gpus * batch / (step + exposed)
                yield (
                    f"| {name} | {kind} | {batch} | {gpus * batch:,} | {step * 1e3:.2f} | {messages * 1e3:.2f} "
                    f"| {exposed * 1e3:.2f} | {rate:,.0f} | {step / (step + exposed):.0%} |"
                )


def main() -> int:
    parser = command("scaling", __doc__)
    parser.add_argument("--batch", type=at_least_one, default=64)
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--model", action="store_true", help="print the prediction, measure nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.batch, options.rounds)
    elif options.model:
        print("\n".join(predicted()))
    else:
        print(measured(options.batch, options.rounds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
