"""Training: stochastic gradient descent over shuffled epochs, with checkpoints that resume to the last bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Final

import numpy as np

from data.loader import load
from pipeline.checkpoint import note_best, prune, save_checkpoint
from pipeline.config import Config
from pipeline.errors import PipelineError, StoppedError
from pipeline.metrics import MetricsLog, read_metrics
from pipeline.progress import Progress
from pipeline.ranks import ALONE, Ranks
from pipeline.run_dir import RunDir
from pipeline.signals import StopRequest
from pipeline.tensorboard import events, require_tensorboard
from stages.setup import MOMENTUM, loader_slots, loader_threads
from stages.start import Begun, State, Training, begin, open_training, require_way_on
from stages.trainer import Records, Trainer


@dataclass(frozen=True)
class Goal:
    """How far to train: to the recipe's end, or so many steps or epochs more."""

    steps: int | None = None
    epochs: int | None = None

    def last_step(self, config: Config, done: int, steps_per_epoch: int) -> int:
        if self.steps is not None:
            return done + self.steps
        if self.epochs is not None:
            return done + self.epochs * steps_per_epoch
        return max(done, config.train.epochs * steps_per_epoch)


def run(
    config: Config,
    run_dir: RunDir,
    load_backend: Callable[[], ModuleType],
    *,
    resume: bool,
    restart: bool,
    goal: Goal,
    device: str,
    precision: str = "fp32",
    tensorboard: bool = False,
    ranks: Ranks = ALONE,
) -> int | None:
    """Train from the beginning or from the newest sound checkpoint, and write ``<run>/train/``.

    Returns the signal that came when nothing was left to stop, None for none.

    ``load_backend`` is called once it is known what to compute. ``device`` and ``precision`` are what the backend
    computes on and in, for the checkpoints' headers. ``tensorboard`` writes the metrics as event files too, to
    ``<run>/train/tensorboard/``. ``ranks`` are the processes that share each batch; their number changes nothing but
    rounding.
    """
    if not restart:
        require_way_on(run_dir.train, resume=resume)
    if tensorboard and ranks.leads:
        require_tensorboard()
    training = open_training(config, run_dir, device, precision, ranks)
    config, dataset, plan = training.config, training.dataset, training.plan
    last_step = partial(goal.last_step, config, steps_per_epoch=plan.steps_per_epoch)
    begun = begin(training, load_backend, last_step, resume=resume)
    ops, first = begun.ops, begun.state.step
    last = last_step(first)
    if first >= last:
        print(f"nothing to train: {first} steps are done; add --epochs N or --steps N to train on")
        return None
    print(
        f"train {len(dataset.train)} pictures, {len(dataset.classes)} classes, recipe {config.recipe}: "
        f"step {first} to {last}, {plan.steps_per_epoch} steps an epoch, batch {config.train.batch_size}"
        + (f" shared by {ranks.size} ranks" if ranks.size > 1 else ""),
        flush=True,
    )
    with contextlib.ExitStack() as stack:
        records = stack.enter_context(_records(config, run_dir, ops, tensorboard)) if ranks.leads else _NO_RECORDS
        stop = stack.enter_context(StopRequest())
        with Progress("train", last, "steps", done=first) as progress:
            _loop(training, begun, Trainer(training, begun, records, progress, last), last, stop)
    print(f"trained to step {last}; checkpoints and metrics are in {run_dir.train}")
    return stop.signum


_NO_RECORDS: Final = Records(write=lambda record: None, save=lambda state, header: None)


@contextlib.contextmanager
def _records(config: Config, run_dir: RunDir, ops: ModuleType, tensorboard: bool) -> Iterator[Records]:
    path = run_dir.train / "metrics.jsonl"
    with contextlib.ExitStack() as stack:
        mirror = None
        if tensorboard:
            mirror = stack.enter_context(events(run_dir.train / "tensorboard", read_metrics(path)))
        log = stack.enter_context(MetricsLog(path, mirror))
        yield Records(log.write, partial(save, run_dir, ops, log, config.train.keep_checkpoints))


def _loop(training: Training, begun: Begun, trainer: Trainer, last: int, stop: StopRequest) -> None:
    """Step from batch to batch; validate and save at an epoch's end; save every so many steps and when told to stop."""
    config, train, plan = training.config, training.config.train, training.plan
    threads = loader_threads(config, begun.ops, plan.largest)
    with contextlib.ExitStack() as stack:
        batches = load(
            training.dataset.train,
            stack.enter_context(plan.read_ahead(trainer.state.step, last)),
            range(trainer.state.step, last),
            crop=config.input.crop,
            largest=plan.largest,
            slots=loader_slots(config, threads),
            threads=threads,
            allocate=begun.ops.host_empty,
        )
        loader = stack.enter_context(contextlib.closing(batches))
        for batch in loader:
            trainer.step(batch)
            done = trainer.state.step
            epochs, rest = divmod(done, plan.steps_per_epoch)
            epoch_ends, ends = rest == 0, done == last
            signum = training.ranks.largest(stop.signum or 0)  # a signal to any rank stops all after the same step
            validation = None
            if epoch_ends and (ends or epochs % train.validate_every == 0):
                validation = _validated(training, begun, trainer)
            if ends or signum or done % train.checkpoint_every == 0 or (epoch_ends and epochs % train.save_every == 0):
                trainer.save({**begun.header, "validation": validation})
            if signum and done < last:
                raise StoppedError(
                    signum,
                    f"stopped at step {done}, everything is saved; go on with: "
                    f"python run_pipeline.py --stage train --resume {training.run_dir.flag}",
                )


def _validated(training: Training, begun: Begun, trainer: Trainer) -> dict[str, float]:
    """The epoch's scores; where they cannot be had, the epoch is saved before that ends the training."""
    try:
        return trainer.validate()
    except (PipelineError, OSError, MemoryError):
        if training.ranks.size == 1:  # of several, the others may be well and not come to save
            trainer.save({**begun.header, "validation": None})
        raise


def save(run_dir: RunDir, ops: ModuleType, log: MetricsLog, keep: int, state: State, header: dict[str, Any]) -> None:
    """Write a checkpoint of the state, and bring latest, best and the older checkpoints in line with it.

    Raises
    ------
    PipelineError
        A number is not finite, or the disk is full and the like; the checkpoints before it are kept.
    """
    arrays = state.parameters | {f"{MOMENTUM}{name}": value for name, value in state.momenta.items()}

    def to_host(name: str, value: Any) -> np.ndarray:
        array = np.asarray(ops.to_host(value))
        if not np.all(np.isfinite(array)):
            raise PipelineError(
                f"{name} is not finite at step {state.step}: training has diverged; the last good checkpoint is kept. "
                "Lower train.lr in a new run (--run)"
            )
        return array

    log.sync()
    path = save_checkpoint(run_dir.train, state.step, header, arrays, to_host)
    if header["validation"] is not None:
        note_best(run_dir.train, path, state.step, header["validation"]["top1"])
    prune(run_dir.train, keep, path)
