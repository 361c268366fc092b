"""Training: stochastic gradient descent over shuffled epochs, with checkpoints that resume to the last bit."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Final

import numpy as np

from data.loader import Batch, load
from net.layers import Layer, fuse
from net.network import Descent, Reduce, prediction, training_step
from pipeline.checkpoint import note_best, prune, save_checkpoint
from pipeline.config import Config, at_epoch
from pipeline.errors import PipelineError, StoppedError
from pipeline.metrics import MetricsLog, read_metrics
from pipeline.progress import Progress
from pipeline.ranks import ALONE, Ranks
from pipeline.run_dir import RunDir
from pipeline.signals import StopRequest
from pipeline.tensorboard import events, require_tensorboard
from stages.batches import Part
from stages.eval import evaluate
from stages.setup import MOMENTUM, decays, jittered, learning_rates, loader_slots, loader_threads, preparation
from stages.start import State, Training, begin, open_training, require_way_on


@dataclass(frozen=True)
class Records:
    """What of a run outlives its process: lines of metrics, and checkpoints. Only the first rank keeps any."""

    write: Callable[[dict[str, Any]], None]
    save: Callable[[State, dict[str, Any]], None]


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
    ops, reduce, state = begin(training, load_backend, last_step, resume=resume)
    last = last_step(state.step)
    if state.step >= last:
        print(f"nothing to train: {state.step} steps are done; add --epochs N or --steps N to train on")
        return None
    fused = fuse(training.layers, ops)
    print(
        f"train {len(dataset.train)} pictures, {len(dataset.classes)} classes, recipe {config.recipe}: "
        f"step {state.step} to {last}, {plan.steps_per_epoch} steps an epoch, batch {config.train.batch_size}"
        + (f" shared by {ranks.size} ranks" if ranks.size > 1 else ""),
        flush=True,
    )
    with contextlib.ExitStack() as stack:
        records = stack.enter_context(_records(config, run_dir, ops, tensorboard)) if ranks.leads else _NO_RECORDS
        stop = stack.enter_context(StopRequest())
        with Progress("train", last, "steps", done=state.step) as progress:
            trainer = _Trainer(training, ops, fused, reduce, state, records, progress)
            _loop(training, ops, trainer, last, stop)
    print(f"trained to step {state.step}; checkpoints and metrics are in {run_dir.train}")
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
        yield Records(log.write, partial(_save, run_dir, ops, log, config.train.keep_checkpoints))


def _loop(training: Training, ops: ModuleType, trainer: _Trainer, last: int, stop: StopRequest) -> None:
    """Step from batch to batch; validate and save at an epoch's end; save every so many steps and when told to stop."""
    config, train, plan = training.config, training.config.train, training.plan
    threads = loader_threads(config, ops, plan.largest)
    with contextlib.ExitStack() as stack:
        batches = load(
            training.dataset.train,
            stack.enter_context(plan.read_ahead(trainer.state.step, last)),
            range(trainer.state.step, last),
            crop=config.input.crop,
            largest=plan.largest,
            slots=loader_slots(config, threads),
            threads=threads,
            allocate=ops.host_empty,
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
                validation = _validated(training, trainer)
            if ends or signum or done % train.checkpoint_every == 0 or (epoch_ends and epochs % train.save_every == 0):
                trainer.save({**training.header, "validation": validation})
            if signum and done < last:
                raise StoppedError(
                    signum,
                    f"stopped at step {done}, everything is saved; go on with: "
                    f"python run_pipeline.py --stage train --resume {training.run_dir.flag}",
                )


def _validated(training: Training, trainer: _Trainer) -> dict[str, float]:
    """The epoch's scores; where they cannot be had, the epoch is saved before that ends the training."""
    try:
        return trainer.validate()
    except (PipelineError, OSError, MemoryError):
        if training.ranks.size == 1:  # of several, the others may be well and not come to save
            trainer.save({**training.header, "validation": None})
        raise


class _Trainer:
    """One step after another, with its metrics."""

    def __init__(
        self,
        training: Training,
        ops: ModuleType,
        layers: tuple[Layer, ...],
        reduce: Reduce | None,
        state: State,
        records: Records,
        progress: Progress,
    ) -> None:
        self.state = state
        self._config, self._dataset, self._ranks = training.config, training.dataset, training.ranks
        self._plan, self._steps_per_epoch = training.plan, training.plan.steps_per_epoch
        self._ops, self._layers, self._reduce = ops, layers, reduce
        self._records, self._progress = records, progress
        self._names = list(state.parameters)
        self._descent = Descent(self._config.train.momentum, decays(self._config, self._names))
        self._function: Callable[[dict[str, Any]], Any] | None = None
        self._jittered: bool | None = None
        self._pending: tuple[int, int, Any, int] | None = None
        self._plateau = Plateau(len(self._dataset.classes), self._config.train.plateau_steps)
        self._restart_clock()

    def step(self, batch: Batch) -> None:
        """Start the step of this batch, then note the loss of the one before."""
        epoch, part = batch.number // self._steps_per_epoch, self._plan.part(batch.number)
        arrays = {
            **batch.arrays,
            "rates": learning_rates(self._config, self._names, epoch),
            "step": np.array([batch.number], dtype=np.uint64),
            **_place(part, self._ranks),
        }
        # A device that exchanges gradients by itself waits for the other ranks, and the host for the device: here, and
        # where a loss is read.
        with self._ranks.watched():
            inputs = self._ops.upload(arrays)
        loss = self._step_function(epoch)(inputs)
        self.settle()
        self._waited += batch.waited
        self._images += part.total
        self.state.step = batch.number + 1
        # On a device of its own, reading a loss makes the host wait: only the losses that are logged are read, each
        # after the next step has been started. On the host every loss is there to look at.
        on_host = isinstance(loss, np.ndarray)
        if on_host or self.state.step % self._config.train.log_every == 0:
            self._pending = self.state.step, epoch, loss, part.counted
        if on_host:
            self.settle()
        self._progress.advance(1)

    def settle(self) -> None:
        """Look at the loss that is still pending: stop on NaN, warn of a plateau, write the metrics line."""
        if self._pending is None:
            return
        step, epoch, loss_each, counted = self._pending
        self._pending = None
        with self._ranks.watched():
            losses = self._ops.to_host(loss_each)[:counted]
        loss = self._ranks.mean(losses)
        if not math.isfinite(loss):
            raise PipelineError(
                f"the loss is {loss} at step {step}: training has diverged; the last good checkpoint is kept. "
                "Lower train.lr (--set train.lr=...) or look at the weights' start, in a new run (--run)"
            )
        if self._plateau.stays(step, loss):
            self._progress.say(self._plateau.advice(loss))
        if step % self._config.train.log_every == 0:
            self._write_line(step, epoch, loss)

    def validate(self) -> dict[str, float]:
        """Accuracy and loss on the validation pictures, centre view, at the end of an epoch."""
        self._finish_steps()
        ops, config = self._ops, self._config
        prepared = preparation(config, self._dataset.mean, ops, jittered=False)
        predict = prediction(ops, self._layers, self.state.parameters, prepared, views=1)
        result = evaluate(ops, predict, self._dataset.val, config, config.eval.batch_size, 1, ranks=self._ranks)
        epochs = self.state.step // self._steps_per_epoch
        scores = {"top1": result.top1, "top5": result.top5, "validation_loss": float(result.loss.mean())}
        self._records.write({"step": self.state.step, "epochs_done": epochs, **scores, "seconds": result.seconds})
        self._progress.say(
            f"epoch {epochs} done: validation top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}, "
            f"loss {scores['validation_loss']:.4f}"
        )
        self._restart_clock()
        return scores

    def save(self, header: dict[str, Any]) -> None:
        """Write a checkpoint, once all ranks have been found to have the same weights."""
        self._finish_steps()
        start = time.perf_counter()
        ops, parameters = self._ops, self.state.parameters
        self._ranks.require_same(
            lambda: b"".join(hashlib.sha256(ops.to_host(value)).digest() for value in parameters.values()),
            f"the ranks' weights have come apart at step {self.state.step}, which a sound machine does not do; "
            "the last checkpoint is kept",
        )
        self._records.save(self.state, header)
        self._ranks.wait()
        self._clock += time.perf_counter() - start  # rates are those of steps

    def _finish_steps(self) -> None:
        with self._ranks.watched():
            self._ops.synchronize()
        self.settle()

    def _step_function(self, epoch: int) -> Callable[[dict[str, Any]], Any]:
        now = jittered(self._config, epoch)
        if self._function is None or now != self._jittered:
            self._jittered = now
            prepared = preparation(self._config, self._dataset.mean, self._ops, jittered=now)
            self._function = training_step(
                self._ops,
                self._layers,
                self.state.parameters,
                self.state.momenta,
                prepared,
                self._descent,
                self._config.seed,
                self._reduce,
            )
        return self._function

    def _write_line(self, step: int, epoch: int, loss: float) -> None:
        elapsed = max(time.perf_counter() - self._clock, 1e-9)
        rate, wait = self._images / elapsed, min(self._waited / elapsed, 1.0)
        self._records.write(
            {
                "step": step,
                "epoch": epoch,
                "loss": loss,
                "lr": at_epoch(self._config.train.lr, epoch),
                "images_per_second": round(rate, 2),
                "data_wait": round(wait, 5),
            }
        )
        self._progress.advance(0, f"loss {loss:.4f}, {rate:.1f} images/s, waiting for data {wait:.1%}")
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._clock = time.perf_counter()
        self._images, self._waited = 0, 0.0


class Plateau:
    """Notices a loss that stays at ln(classes), what a network scores that says the same of every picture."""

    WIDTH = 0.02

    def __init__(self, classes: int, patience: int) -> None:
        self._level, self._patience = math.log(classes), patience
        self._since: int | None = None
        self._told = False

    def stays(self, step: int, loss: float) -> bool:
        """True once, when the loss has been within 0.02 of ln(classes) for ``patience`` steps."""
        if abs(loss - self._level) > self.WIDTH or self._level == 0:  # a single class has no other loss
            self._since = None
            return False
        if self._since is None:
            self._since = step
        if self._told or step - self._since < self._patience:
            return False
        self._told = True
        return True

    def advice(self, loss: float) -> str:
        return (
            f"warning: the loss has stayed at {loss:.3f}, which is ln(classes) = {self._level:.3f}, for "
            f"{self._patience} steps: the network says the same of every picture. Known causes are initial biases of "
            "1 together with weights of standard deviation 0.01 everywhere (the paper's text), or scores that have all "
            "become negative before a last ReLU (network.final_relu; the loss is then exactly ln(classes)); try "
            "--recipe original or --recipe caffe, --set network.weight_std=[0,0,0,0,0,0,0,0] (He's rule), or another "
            "--seed, each in a new run (--run)"
        )


def _place(part: Part, ranks: Ranks) -> dict[str, np.ndarray]:
    """What a training step must know of a rank's place in the batch; nothing for a process on its own."""
    if ranks.size == 1:
        return {}
    share = np.array([part.counted / part.total], dtype=np.float32)
    return {"first": np.array([part.first], dtype=np.uint64), "share": share}


def _save(run_dir: RunDir, ops: ModuleType, log: MetricsLog, keep: int, state: State, header: dict[str, Any]) -> None:
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
