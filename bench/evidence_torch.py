"""A run's training done by PyTorch instead: same start, same batches, same dropout masks, same schedule.

    python -m bench.evidence_torch --run RUN [--device cuda] [--precision tf32]

``RUN`` is a preprocessed run directory with its ``config.json``. From this project come the initial weights, the order
of the pictures with their crops, flips and colour shifts, the generator of the dropout masks and the learning rates;
PyTorch prepares the pictures, runs the network, differentiates it by its autograd, and updates. ``bf16`` is its
autocast. Checkpoints and metrics are written as ``--stage train`` writes them, so ``--stage eval``, ``report`` and
``watch`` work on the result, and a run that was stopped goes on from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F

from bench import command, parity
from data.dataset import Dataset, open_dataset
from data.loader import load
from data.manifest import data_fingerprint
from net import reference
from net.network import initial_parameters
from net.reference import philox
from pipeline.checkpoint import newest_sound, note_best, prune, save_checkpoint
from pipeline.config import Config, Network
from pipeline.config_values import from_dict, to_dict
from pipeline.errors import PipelineError, StoppedError
from pipeline.metrics import MetricsLog, cut_back
from pipeline.run_dir import RunDir, read_sealed
from pipeline.signals import StopRequest
from stages.batches import TrainingPlan
from stages.eval import evaluate
from stages.setup import MOMENTUM, decays, jittered, learning_rate, learning_rates, loader_slots, network_layers, shapes

PRECISIONS: Final = ("fp32", "tf32", "bf16")
Dropout = Callable[[torch.Tensor, int], torch.Tensor]


def train(run: RunDir, config: Config, device: str = "cpu", precision: str = "fp32") -> None:
    """Train to the recipe's end, from the newest sound checkpoint where there is one."""
    _set_up(device, precision)
    dataset = open_dataset(run)
    plan = TrainingPlan(config, dataset)
    per_epoch, last = plan.steps_per_epoch, config.train.epochs * plan.steps_per_epoch
    expected = shapes(network_layers(config, len(dataset.classes)), config)
    saved = newest_sound(run.train)[0]
    if saved is None:
        done, arrays = 0, initial_parameters(expected, config.network.weight_std, config.network.bias, config.seed)
    else:
        done, arrays = saved.header["step"], saved.arrays
    names = list(expected)
    parameters = {name: parity.to_torch(arrays[name], device).requires_grad_() for name in names}
    zeros = {name: np.zeros(shape, np.float32) for name, shape in expected.items()}
    velocities = {name: parity.to_torch(arrays.get(f"{MOMENTUM}{name}", zeros[name]), device) for name in names}
    mean = torch.from_numpy(dataset.mean).permute(2, 0, 1).to(device)
    decay = decays(config, names)
    cut_back(run.train / "metrics.jsonl", done)
    threads = config.loader.threads or (1 if device == "cpu" else 4)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        log = stack.enter_context(MetricsLog(run.train / "metrics.jsonl"))
        batches = load(
            dataset.train,
            plan,
            range(done, last),
            crop=config.input.crop,
            largest=config.train.batch_size,
            slots=loader_slots(config, threads),
            threads=threads,
            allocate=np.empty if device == "cpu" else _pinned,
        )
        clock, images, waited = time.perf_counter(), 0, 0.0
        for batch in stack.enter_context(contextlib.closing(batches)):
            epoch, step = batch.number // per_epoch, batch.number + 1
            there = {name: torch.from_numpy(value).to(device) for name, value in batch.arrays.items()}
            x = parity.torch_input(config, mean, there, torch.float32, jittered=jittered(config, epoch))
            with _arithmetic(device, precision):
                scores = parity.torch_scores(config.network, parameters, x, _masked(config, batch.number))
            loss = F.cross_entropy(scores.float(), there["labels"].long())
            gradients = dict(zip(names, torch.autograd.grad(loss, list(parameters.values())), strict=True))
            rates = dict(zip(names, learning_rates(config, names, epoch).tolist(), strict=True))
            parity.torch_update(parameters, velocities, gradients, rates, decay, config.train.momentum)
            images, waited = images + len(there["labels"]), waited + batch.waited
            if step % config.train.log_every == 0 or step == last:
                number = float(loss.detach())
                if not math.isfinite(number):
                    raise PipelineError(f"PyTorch's loss is {number} at step {step}: training has diverged")
                seconds = time.perf_counter() - clock
                log.write(
                    {
                        "step": step,
                        "epoch": epoch,
                        "loss": number,
                        "lr": learning_rate(config.train, epoch),
                        "images_per_second": round(images / seconds, 2),
                        "data_wait": round(min(waited / seconds, 1.0), 5),
                    }
                )
                clock, images, waited = time.perf_counter(), 0, 0.0
            epochs, rest = divmod(step, per_epoch)
            validation = None
            if rest == 0 and (step == last or epochs % config.train.validate_every == 0):
                validation = _validate(config, dataset, parameters, mean, device, precision)
                log.write({"step": step, "epochs_done": epochs, **validation})
                print(f"epoch {epochs} done: validation top-1 {validation['top1']:.2%}", flush=True)
                clock, images, waited = time.perf_counter(), 0, 0.0
            if step == last or stop.signum or (rest == 0 and epochs % config.train.save_every == 0):
                log.sync()
                _save(run, config, dataset, step, parameters, velocities, validation)
                clock, images, waited = time.perf_counter(), 0, 0.0
            if stop.signum and step < last:
                raise StoppedError(stop.signum, f"stopped at step {step}, everything is saved")


def _set_up(device: str, precision: str) -> None:
    """Say how PyTorch shall compute; refuses what the device does not have."""
    if device == "cuda" and not torch.cuda.is_available():
        raise PipelineError("PyTorch finds no GPU here: use --device cpu")
    if device == "cpu" and precision != "fp32":
        raise PipelineError(f"on the CPU PyTorch computes in fp32 here, not in {precision}: use --device cuda")
    # PyTorch's own defaults are TF32 for convolutions and float32 for products.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True  # the fastest of cuDNN's algorithms, as its users are told to


def _arithmetic(device: str, precision: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def _pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return torch.from_numpy(np.empty(shape, dtype)).pin_memory().numpy()


def _masked(config: Config, step: int) -> Dropout:
    """Dropout in training, with the masks that ``--stage train`` draws at this step."""
    network = config.network

    def dropout(x: torch.Tensor, layer: int) -> torch.Tensor:
        if network.dropout_keep == 1:
            return x
        mask = dropout_mask(tuple(x.shape), network.dropout_keep, config.seed, step, layer, x.device)
        return x * mask / (network.dropout_keep if network.dropout_scale_in_training else 1.0)

    return dropout


def dropout_mask(
    shape: tuple[int, ...], keep: float, seed: int, step: int, layer: int, device: torch.device | str
) -> torch.Tensor:
    """``net.reference.dropout.dropout_mask`` in PyTorch, on ``device``: the same Philox words, the same mask.

    Words are held in int64, which has room for 32 bits without a sign. A product of two has 64 bits and wraps; its low
    half is right all the same, and so is the high half once the copies of the sign that the shift brings are cut off.
    """
    size, low = math.prod(shape), 2**32 - 1
    c0 = torch.arange(-(-size // 4), device=device)
    c1, c2, c3 = (torch.full_like(c0, word) for word in (layer, step & low, step >> 32))
    k0, k1 = seed & low, seed >> 32
    for _ in range(philox.ROUNDS):
        p0, p1 = c0 * int(philox.M0), c2 * int(philox.M1)
        high0, high1 = (p0 >> 32) & low, (p1 >> 32) & low
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & low, high0 ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + philox.W0) & low, (k1 + philox.W1) & low
    drawn = torch.stack((c0, c1, c2, c3), dim=-1).flatten()[:size]
    return (drawn < math.floor(keep * 2**32)).reshape(shape)


def _in_test(network: Network) -> Dropout:
    return lambda x, layer: x if network.dropout_scale_in_training else x * network.dropout_keep


def _validate(
    config: Config,
    dataset: Dataset,
    parameters: dict[str, torch.Tensor],
    mean: torch.Tensor,
    device: str,
    precision: str,
) -> dict[str, float]:
    """Centre view, with PyTorch's own forward pass."""

    def predict(inputs: dict[str, Any]) -> np.ndarray:
        with torch.no_grad(), _arithmetic(device, precision):
            there = {name: torch.from_numpy(value).to(device) for name, value in inputs.items()}
            x = parity.torch_input(config, mean, there, torch.float32, jittered=False)
            scores = parity.torch_scores(config.network, parameters, x, _in_test(config.network))
            return scores.float().softmax(1).cpu().numpy()

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
    validation: dict[str, float] | None,
) -> None:
    arrays = {name: parity.from_torch(p.detach()) for name, p in parameters.items()}
    arrays |= {f"{MOMENTUM}{name}": parity.from_torch(v) for name, v in velocities.items()}
    header = {
        "schema": 1,
        "config": to_dict(config),
        "data": data_fingerprint(dataset.manifest),
        "classes": len(dataset.classes),
        "wnids": [entry["wnid"] for entry in dataset.classes],
        "device": f"PyTorch {torch.__version__}",
        "validation": validation,
    }
    path = save_checkpoint(run.train, step, header, arrays)
    if validation is not None:
        note_best(run.train, path, step, validation["top1"])
    prune(run.train, 1, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command("evidence_torch", __doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    options = parser.parse_args(arguments)
    run = RunDir(options.run)
    config = from_dict(read_sealed(run.config, "start it with python -m bench.evidence"), str(run.config))
    try:
        train(run, config, options.device, options.precision)
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
