"""The loss of each step, ours beside PyTorch's: ``python -m bench.cpu_curves --run RUN`` draws two curves and a spread.

``RUN`` is a preprocessed run directory. All contestants begin with the same weights and get the same pictures, crops,
flips, colour shifts, dropout masks and learning rate; what differs is rounding. Rounding is enough to part any two
programs in time (``bench.parity`` says why), PyTorch from itself too: with another number of threads it adds up in
another order. So PyTorch runs twice, with all cores and with one, and the distance between these two curves is the
measure: ours should be no further from PyTorch's than they are from each other.

    python run_pipeline.py --stage preprocess --source imagenette --recipe seed --run RUN
    python -m bench.cpu_curves --run RUN --recipe demo --steps 200 --batch 8

``--only`` runs a part; with ``--json FILE`` the curves of several parts collect in one file. The table has the mean
loss of every fifty steps and the distances, as root mean square over these steps. Exit status 1 where, over all steps,
ours is further from the mean of PyTorch's two curves than those are from each other, or where our own curve depends on
the number of threads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench import command
from bench.hand import begin
from data.dataset import Dataset, open_dataset
from data.loader import load
from net.network import initial_parameters
from pipeline.command_line import at_least_one
from pipeline.config import RECIPES, Config
from pipeline.config_values import from_dict
from pipeline.run_dir import RunDir, read_sealed
from stages.batches import TrainingPlan, with_order
from stages.setup import decays, learning_rates, network_layers, shapes

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("hand", "hand-one", "torch", "torch-one")  # with all cores, and with one
WINDOW = 50
Host = dict[str, np.ndarray]


def configuration(run: RunDir, dataset: Dataset, recipe: str | None, batch: int, rate: float) -> Config:
    """A recipe, or the run's own configuration, with this batch and a constant learning rate, the biases' like it."""
    own = from_dict(read_sealed(run.config, "preprocess first"), str(run.config))
    config = replace(RECIPES[recipe], preprocess=own.preprocess) if recipe else own
    train = replace(config.train, batch_size=batch, lr=((0, rate),), bias_lr=())
    return with_order(replace(config, train=train), dataset)


def batches(config: Config, dataset: Dataset, steps: int) -> Iterator[tuple[int, Host]]:
    """Number and arrays of each batch of ``--stage train``; valid until the next one is asked for."""
    loader = load(
        dataset.train,
        TrainingPlan(config, dataset),
        range(steps),
        crop=config.input.crop,
        largest=config.train.batch_size,
        slots=4,
        threads=1,
    )
    with contextlib.closing(loader):
        for batch in loader:
            yield batch.number, batch.arrays


def by_hand(config: Config, dataset: Dataset, start: Host, steps: int) -> list[float]:
    import net.cpu as ops

    step = begin(ops, config, len(dataset.classes), start, dataset.mean, config.seed).step
    rates = learning_rates(config, list(start), 0)
    return [
        float(
            step(ops.upload({**arrays, "rates": rates, "step": np.array([number], np.uint64)})).mean(dtype=np.float64)
        )
        for number, arrays in batches(config, dataset, steps)
    ]


def by_torch(config: Config, dataset: Dataset, start: Host, steps: int, threads: int) -> list[float]:
    import torch
    import torch.nn.functional as F

    from bench import parity
    from net.reference.dropout import dropout_mask

    torch.set_num_threads(threads)
    names = list(start)
    parameters = {name: parity.to_torch(start[name], "cpu").requires_grad_() for name in names}
    velocities = {name: torch.zeros_like(p) for name, p in parameters.items()}
    rates = dict(zip(names, learning_rates(config, names, 0).tolist(), strict=True))
    keep = config.network.dropout_keep
    scale = 1 / keep if config.network.dropout_scale_in_training else 1.0
    mean = torch.from_numpy(dataset.mean.transpose(2, 0, 1).copy())
    losses = []
    for number, arrays in batches(config, dataset, steps):
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        x = parity.torch_input(config, mean, batch, torch.float32, jittered=config.input.jitter > 0)

        def dropout(y: torch.Tensor, layer: int, number: int = number) -> torch.Tensor:
            return y * torch.from_numpy(dropout_mask(tuple(y.shape), keep, (config.seed, number, layer))) * scale

        scores = parity.torch_scores(config.network, parameters, x, dropout)
        loss = F.cross_entropy(scores, batch["labels"].long())
        gradients = dict(zip(names, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        parity.torch_update(parameters, velocities, gradients, rates, decays(config, names), config.train.momentum)
        losses.append(float(loss.detach().double()))
    return losses


def curve(side: str, options: argparse.Namespace) -> list[float]:
    """The losses of one side, computed in this process."""
    run = RunDir(options.run)
    dataset = open_dataset(run)
    config = configuration(run, dataset, options.recipe, options.batch, options.rate)
    expected = shapes(network_layers(config, len(dataset.classes)), config)
    start = initial_parameters(expected, config.network.weight_std, config.network.bias, config.seed)
    if side.startswith("hand"):
        return by_hand(config, dataset, start, options.steps)
    return by_torch(config, dataset, start, options.steps, 1 if side.endswith("one") else cores())


def cores() -> int:
    return len(os.sched_getaffinity(0))


def in_a_process(side: str, options: argparse.Namespace) -> list[float]:
    """The number of threads has to be known before Numba and BLAS are loaded."""
    threads = "1" if side.endswith("one") else str(cores())
    command = [sys.executable, "-m", "bench.cpu_curves", "--side", side, "--run", str(options.run)]
    for name in ("recipe", "steps", "batch", "rate"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    few = {"NUMBA_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **few}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def report(curves: dict[str, list[float]]) -> int:
    """Print the table; returns the exit status."""
    ours, one, other = (np.array(curves[side]) for side in ("hand", "torch", "torch-one"))
    middle = (one + other) / 2
    print("| steps | loss, ours | PyTorch | PyTorch, one thread | ours from PyTorch's mean | PyTorch's two runs |")
    print("|---|---|---|---|---|---|")
    windows = [slice(first, min(first + WINDOW, len(ours))) for first in range(0, len(ours), WINDOW)]
    for part in (*windows, slice(0, len(ours))):
        means = " | ".join(f"{a[part].mean():.4f}" for a in (ours, one, other))
        apart = f"{distance(ours[part], middle[part]):.1e} | {distance(one[part], other[part]):.1e}"
        print(f"| {part.start + 1} to {part.stop} | {means} | {apart} |")
    status = 0 if distance(ours, middle) <= distance(one, other) else 1
    if "hand-one" in curves:
        same = curves["hand-one"] == curves["hand"]
        print(f"our losses with one thread are {'the same to the last bit' if same else 'others'}")
        status |= not same
    return status


def main() -> int:
    parser = command("cpu_curves", __doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a preprocessed run directory")
    parser.add_argument("--recipe", choices=list(RECIPES), help="default: the run's own configuration")
    parser.add_argument("--steps", type=at_least_one, default=200)
    parser.add_argument("--batch", type=at_least_one, default=8)
    parser.add_argument("--rate", type=float, default=0.002, help="learning rate")
    parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the curves in FILE, beside those it holds")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.run = options.run.absolute()
    if options.side:
        print(json.dumps(curve(options.side, options)))
        return 0
    curves = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for side in options.only:
        curves[side] = in_a_process(side, options)
        print(f"  {side}: loss {curves[side][0]:.4f} to {curves[side][-1]:.4f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(curves) + "\n")
    missing = {"hand", "torch", "torch-one"} - set(curves)
    if missing:
        print(f"not measured yet: {', '.join(sorted(missing))}")
        return 0
    return report(curves)


if __name__ == "__main__":
    raise SystemExit(main())
