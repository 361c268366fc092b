"""A run's training done by PyTorch instead: same start, same batches, same dropout masks, same schedule.

    python -m bench.evidence_torch --run RUN

``RUN`` is a preprocessed run directory with its ``config.json``. From this project come the initial weights, the order
of the pictures with their crops, flips and colour shifts, the dropout masks and the learning rates; PyTorch prepares
the pictures, runs the network, differentiates it by its autograd, and updates. Checkpoints and metrics are written as
``--stage train`` writes them, so ``--stage eval``, ``report`` and ``watch`` work on the result, and a run that was
stopped goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench import parity
from data.loader import load
from net import reference
from net.network import initial_parameters
from net.reference.dropout import dropout_mask
from pipeline.checkpoint import newest_sound, note_best, prune, save_checkpoint
from pipeline.config import Config, Network, at_epoch, from_dict, to_dict
from pipeline.errors import PipelineError
from pipeline.metrics import MetricsLog, cut_back
from pipeline.run_dir import RunDir, fingerprint, read_sealed
from stages.eval import evaluate
from stages.setup import Dataset, TrainingPlan, decays, jittered, learning_rates, network_layers, open_dataset, shapes


def train(run: RunDir, config: Config) -> None:
    """Train to the recipe's end, from the newest sound checkpoint where there is one."""
    dataset = open_dataset(run)
    plan = TrainingPlan(config, dataset)
    expected = shapes(network_layers(config, len(dataset.classes)), config)
    saved = newest_sound(run.train)[0]
    if saved is None:
        done, arrays = 0, initial_parameters(expected, config.network.weight_std, config.network.bias, config.seed)
    else:
        done, arrays = saved.header["step"], saved.arrays
    names = list(expected)
    parameters = {name: parity.to_torch(arrays[name], "cpu").requires_grad_() for name in names}
    zeros = {name: np.zeros(shape, np.float32) for name, shape in expected.items()}
    velocities = {name: parity.to_torch(arrays.get(f"momentum/{name}", zeros[name]), "cpu") for name in names}
    decay = decays(config, names)
    cut_back(run.train / "metrics.jsonl", done)
    batches = load(
        dataset.train,
        plan,
        range(done, config.train.epochs * plan.steps_per_epoch),
        crop=config.input.crop,
        largest=config.train.batch_size,
        slots=config.loader.slots,
        threads=config.loader.threads,
    )
    with contextlib.closing(batches) as loader, MetricsLog(run.train / "metrics.jsonl") as log:
        clock, images = time.perf_counter(), 0
        for batch in loader:
            epoch, step = batch.number // plan.steps_per_epoch, batch.number + 1
            x = parity.torch_input(config, dataset.mean, batch.arrays, torch.float32, jittered=jittered(config, epoch))
            scores = parity.torch_scores(config.network, parameters, x, _masked(config, batch.number))
            loss = F.cross_entropy(scores, torch.from_numpy(batch.arrays["labels"]).long())
            gradients = dict(zip(names, torch.autograd.grad(loss, list(parameters.values())), strict=True))
            rates = dict(zip(names, learning_rates(config, names, epoch).tolist(), strict=True))
            parity.torch_update(parameters, velocities, gradients, rates, decay, config.train.momentum)
            images += len(batch.arrays["labels"])
            number = float(loss.detach())
            if not math.isfinite(number):
                raise PipelineError(f"PyTorch's loss is {number} at step {step}: training has diverged")
            if step % config.train.log_every == 0:
                seconds = time.perf_counter() - clock
                log.write(
                    {
                        "step": step,
                        "epoch": epoch,
                        "loss": number,
                        "lr": at_epoch(config.train.lr, epoch),
                        "images_per_second": images / seconds,
                        "data_wait": 0.0,
                    }
                )
                clock, images = time.perf_counter(), 0
            if step % plan.steps_per_epoch == 0:
                validation = _validate(config, dataset, parameters)
                log.write({"step": step, "epochs_done": epoch + 1, **validation})
                log.sync()
                _save(run, config, dataset, step, parameters, velocities, validation)
                print(f"epoch {epoch + 1} done: validation top-1 {validation['top1']:.2%}", flush=True)
                clock, images = time.perf_counter(), 0


def _masked(config: Config, step: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Dropout in training, with the masks that ``--stage train`` draws at this step."""
    network = config.network

    def dropout(x: torch.Tensor, layer: int) -> torch.Tensor:
        if network.dropout_keep == 1:
            return x
        mask = torch.from_numpy(dropout_mask(tuple(x.shape), network.dropout_keep, (config.seed, step, layer)))
        return x * mask / (network.dropout_keep if network.dropout_scale_in_training else 1.0)

    return dropout


def _in_test(network: Network) -> Callable[[torch.Tensor, int], torch.Tensor]:
    return lambda x, layer: x if network.dropout_scale_in_training else x * network.dropout_keep


def _validate(config: Config, dataset: Dataset, parameters: dict[str, torch.Tensor]) -> dict[str, float]:
    """Centre view, with PyTorch's own forward pass."""

    def predict(inputs: dict[str, Any]) -> np.ndarray:
        with torch.no_grad():
            x = parity.torch_input(config, dataset.mean, inputs, torch.float32, jittered=False)
            return parity.torch_scores(config.network, parameters, x, _in_test(config.network)).softmax(1).numpy()

    result = evaluate(reference, predict, dataset.val, config, min(config.eval.batch_size, 128), 1)
    return {
        "top1": result.top1,
        "top5": result.top5,
        "validation_loss": float(result.loss.mean()),
        "seconds": result.seconds,
    }


def _save(
    run: RunDir,
    config: Config,
    dataset: Dataset,
    step: int,
    parameters: dict[str, torch.Tensor],
    velocities: dict[str, torch.Tensor],
    validation: dict[str, float],
) -> None:
    arrays = {name: parity.from_torch(p.detach()) for name, p in parameters.items()}
    arrays |= {f"momentum/{name}": parity.from_torch(v) for name, v in velocities.items()}
    header = {
        "schema": 1,
        "config": to_dict(config),
        "data": fingerprint(dataset.manifest),
        "classes": len(dataset.classes),
        "wnids": [entry["wnid"] for entry in dataset.classes],
        "device": f"PyTorch {torch.__version__}",
        "validation": validation,
    }
    path = save_checkpoint(run.train, step, header, arrays)
    note_best(run.train, path, step, validation["top1"])
    prune(run.train, 1, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence_torch", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    run = RunDir(parser.parse_args(arguments).run)
    config = from_dict(read_sealed(run.config, "start it with python -m bench.evidence"), str(run.config))
    try:
        train(run, config)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
