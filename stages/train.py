"""Training: stochastic gradient descent over shuffled epochs, with checkpoints that resume to the last bit."""

from __future__ import annotations

import contextlib
import hashlib
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, Final

import numpy as np

from data.loader import Batch, load
from net.layers import fuse
from net.network import Descent, Reduce, drawing, initial_parameters, prediction, training_step, zeros
from pipeline.checkpoint import (
    Checkpoint,
    checkpoints,
    move_aside,
    newest_sound,
    note_best,
    note_latest,
    prune,
    save_checkpoint,
    step_of,
)
from pipeline.config import Config, at_epoch, difference, from_dict, to_dict
from pipeline.errors import PipelineError, StoppedError
from pipeline.metrics import MetricsLog, cut_back, read_metrics
from pipeline.progress import Progress
from pipeline.ranks import ALONE, Ranks
from pipeline.run_dir import RunDir, fingerprint, make_folder, write_sealed
from pipeline.signals import StopRequest
from pipeline.tensorboard import events
from stages.eval import evaluate
from stages.setup import (
    Dataset,
    Part,
    TrainingPlan,
    decays,
    jittered,
    learning_rates,
    network_layers,
    open_dataset,
    preparation,
    require_memory,
    require_size,
    shapes,
    with_order,
)

# Settings that may differ between the run so far and its continuation: they change no weight.
_FREE = (
    "epochs",
    "checkpoint_every",
    "save_every",
    "validate_every",
    "log_every",
    "keep_checkpoints",
    "plateau_steps",
)


@dataclass
class State:
    """The numbers training changes: steps done, parameters and momenta (on the backend's device)."""

    step: int
    parameters: dict[str, Any]
    momenta: dict[str, Any]


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
) -> None:
    """Train from the beginning or from the newest sound checkpoint, and write ``<run>/train/``.

    ``load_backend`` is called once it is known what to compute. ``device`` and ``precision`` are what the backend
    computes on and in, for the checkpoints' headers. ``tensorboard`` writes the metrics as event files too, to
    ``<run>/train/tensorboard/``. ``ranks`` are the processes that share each batch; their number changes nothing but
    rounding.
    """
    dataset = open_dataset(run_dir)
    require_size(config, dataset, run_dir)
    layers = network_layers(config, len(dataset.classes))
    config = with_order(config, dataset)
    header = _header(config, dataset, device, precision, ranks)
    ranks.require_same(lambda: fingerprint(header).encode(), "the ranks have different data, settings or software")
    plan = TrainingPlan(config, dataset, ranks)
    expected = shapes(layers, config)
    how = (expected, config.network.weight_std, config.network.bias, config.seed)
    with contextlib.ExitStack() as beside:
        fresh = partial(initial_parameters, *how)
        if ranks.leads and not resume:
            # Loading the backend takes most of a second and one core, and so does drawing: both at once.
            fresh = beside.enter_context(drawing(*how))
        ops = load_backend()
        require_memory(ops, layers, config, min(plan.largest, len(dataset.train)), training=True)
        if hasattr(ops, "warm_up"):
            ops.warm_up()
        begin = partial(_begin, config, run_dir, expected, header, fresh, resume=resume, restart=restart)
        state = _on_device(ops, _shared(ranks, expected, begin))
    last = goal.last_step(config, state.step, plan.steps_per_epoch)
    if state.step >= last:
        print(f"nothing to train: {state.step} steps are done; add --epochs N or --steps N to train on")
        return
    fused = fuse(layers, ops)
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
            trainer = _Trainer(config, dataset, ops, fused, state, records, progress, plan, ranks)
            _loop(config, run_dir, dataset, ops, plan, trainer, header, last, stop)
    print(f"trained to step {state.step}; checkpoints and metrics are in {run_dir.train}")


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


def _loop(
    config: Config,
    run_dir: RunDir,
    dataset: Dataset,
    ops: ModuleType,
    plan: TrainingPlan,
    trainer: _Trainer,
    header: dict[str, Any],
    last: int,
    stop: StopRequest,
) -> None:
    """Step from batch to batch; validate and save at an epoch's end; save every so many steps and when told to stop."""
    train = config.train
    with contextlib.ExitStack() as stack:
        batches = load(
            dataset.train,
            stack.enter_context(plan.read_ahead(trainer.state.step, last)),
            range(trainer.state.step, last),
            crop=config.input.crop,
            largest=plan.largest,
            slots=config.loader.slots,
            threads=config.loader.threads,
            allocate=ops.host_empty,
        )
        loader = stack.enter_context(contextlib.closing(batches))
        for batch in loader:
            trainer.step(batch)
            done = trainer.state.step
            epochs, rest = divmod(done, plan.steps_per_epoch)
            epoch_ends, ends = rest == 0, done == last
            signum = trainer.ranks.largest(stop.signum or 0)  # a signal to any rank stops all after the same step
            validation = None
            if epoch_ends and (ends or epochs % train.validate_every == 0):
                validation = trainer.validate()
            if ends or signum or done % train.checkpoint_every == 0 or (epoch_ends and epochs % train.save_every == 0):
                trainer.save({**header, "validation": validation})
            if signum and done < last:
                raise StoppedError(
                    signum,
                    f"stopped at step {done}, everything is saved; go on with: "
                    f"python run_pipeline.py --stage train --resume --run {run_dir.root}",
                )


class _Trainer:
    """One step after another, with its metrics."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        ops: ModuleType,
        layers: tuple[Any, ...],
        state: State,
        records: Records,
        progress: Progress,
        plan: TrainingPlan,
        ranks: Ranks,
    ) -> None:
        self.state, self.ranks = state, ranks
        self._config, self._dataset, self._ops, self._layers = config, dataset, ops, layers
        self._records, self._progress = records, progress
        self._plan, self._steps_per_epoch = plan, plan.steps_per_epoch
        self._names = list(state.parameters)
        self._descent = Descent(config.train.momentum, decays(config, self._names))
        self._function: Callable[[dict[str, Any]], Any] | None = None
        self._jittered: bool | None = None
        self._pending: tuple[int, int, Any, int] | None = None
        self._plateau = Plateau(len(dataset.classes), config.train.plateau_steps)
        self._restart_clock()

    def step(self, batch: Batch) -> None:
        """Start the step of this batch, then note the loss of the one before."""
        epoch, part = batch.number // self._steps_per_epoch, self._plan.part(batch.number)
        inputs = self._ops.upload(
            {
                **batch.arrays,
                "rates": learning_rates(self._config, self._names, epoch),
                "step": np.array([batch.number], dtype=np.uint64),
                **_place(part, self.ranks),
            }
        )
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
        loss = self.ranks.mean(self._ops.to_host(loss_each)[:counted])
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
        self.settle()
        ops, config = self._ops, self._config
        prepared = preparation(config, self._dataset.mean, ops, jittered=False)
        predict = prediction(ops, self._layers, self.state.parameters, prepared, views=1)
        result = evaluate(ops, predict, self._dataset.val, config, config.eval.batch_size, 1, ranks=self.ranks)
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
        self.settle()
        start = time.perf_counter()
        ops, parameters = self._ops, self.state.parameters
        self.ranks.require_same(
            lambda: b"".join(hashlib.sha256(ops.to_host(value)).digest() for value in parameters.values()),
            f"the ranks' weights have come apart at step {self.state.step}, which a sound machine does not do; "
            "the last checkpoint is kept",
        )
        self._records.save(self.state, header)
        self.ranks.wait()
        self._clock += time.perf_counter() - start  # rates are those of steps

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
                _reduction(self._ops, self.ranks),
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


def _reduction(ops: ModuleType, ranks: Ranks) -> Reduce | None:
    """How gradients become their sums over all ranks: by the device's own means where it has them."""
    if ranks.size == 1:
        return None
    return ops.reduction(ranks.rank, ranks.size, ranks.broadcast) if hasattr(ops, "reduction") else ranks.reduce


def _shared(ranks: Ranks, expected: dict[str, tuple[int, ...]], begin: Callable[[], State]) -> State:
    """The state the first rank begins with, on all ranks: it alone reads and tidies the run directory."""
    state = begin() if ranks.leads else State(0, zeros(expected), zeros(expected))
    step = np.array([state.step], dtype=np.int64)
    for array in (step, *state.parameters.values(), *state.momenta.values()):
        ranks.broadcast(array)
    state.step = int(step[0])
    return state


def _on_device(ops: ModuleType, state: State) -> State:
    """The state's arrays, each given up on the host as soon as it is on the device."""
    adopt = getattr(ops, "adopt", ops.asarray)
    parameters, momenta = (
        {name: adopt(arrays.pop(name)) for name in list(arrays)} for arrays in (state.parameters, state.momenta)
    )
    return State(state.step, parameters, momenta)


def _begin(
    config: Config,
    run_dir: RunDir,
    expected: dict[str, tuple[int, ...]],
    header: dict[str, Any],
    fresh: Callable[[], dict[str, np.ndarray]],
    *,
    resume: bool,
    restart: bool,
) -> State:
    """The state to train on from: the newest sound checkpoint when resuming, fresh parameters otherwise."""
    state = _first_state(config, run_dir, expected, header, fresh, resume=resume, restart=restart)
    # Only now: a run that is refused keeps its configuration, and --resume with it.
    write_sealed(run_dir.config, to_dict(config))
    return state


def _first_state(
    config: Config,
    run_dir: RunDir,
    expected: dict[str, tuple[int, ...]],
    header: dict[str, Any],
    fresh: Callable[[], dict[str, np.ndarray]],
    *,
    resume: bool,
    restart: bool,
) -> State:
    folder = run_dir.train
    if checkpoints(folder) and not resume and not restart:
        raise PipelineError(
            f"{folder} holds checkpoints up to step {step_of(checkpoints(folder)[-1])}; add --resume to go on from "
            "there, or --restart to start over (the old ones are moved aside, not deleted)"
        )
    if restart and checkpoints(folder):
        print(f"started over; the old checkpoints and metrics are in {move_aside(folder)}")
    if resume:
        saved, complaints = newest_sound(folder)
        for complaint in complaints:
            print(f"warning: {complaint}")
        if saved is not None:
            return _resume(saved, config, run_dir, header, expected)
        if complaints:
            raise PipelineError(
                f"no checkpoint in {folder} can be read; start over with --restart (the old ones are moved aside)"
            )
        print(f"there is nothing to resume in {folder}: training starts from the beginning")
    make_folder(folder)
    cut_back(folder / "metrics.jsonl", 0)
    return State(0, fresh(), zeros(expected))


def _resume(
    saved: Checkpoint,
    config: Config,
    run_dir: RunDir,
    header: dict[str, Any],
    expected: dict[str, tuple[int, ...]],
) -> State:
    folder, step = run_dir.train, saved.header["step"]
    if saved.header.get("data") != header["data"]:
        raise PipelineError(
            f"{saved.path} was trained on other data than {run_dir.preprocess} holds now; "
            "restore that data, or start a new run with --run"
        )
    before = from_dict(saved.header["config"], str(saved.path))
    if before.train.order == "auto":  # written before there was another order
        before = replace(before, train=replace(before.train, order="uniform"))
    differing = difference(_without_free(before), _without_free(config))
    if differing:
        raise PipelineError(
            f"{saved.path} was trained with other settings: {'; '.join(differing)}. "
            "Resume with the settings of the run (leave out --recipe, --config, --set and --seed), "
            "or start a new run with --run"
        )
    names = {f"{prefix}{name}": shape for prefix in ("", "momentum/") for name, shape in expected.items()}
    if {name: array.shape for name, array in saved.arrays.items()} != names:
        raise PipelineError(f"{saved.path} holds other arrays than this network has; start a new run with --run")
    cut_back(folder / "metrics.jsonl", step)
    # What a crash between a checkpoint and its indexes left undone.
    note_latest(folder, saved.path)
    validation = saved.header.get("validation")
    if validation is not None:
        note_best(folder, saved.path, step, validation["top1"])
    prune(folder, config.train.keep_checkpoints, saved.path)
    print(f"resumed from {saved.path}, step {step}")
    if saved.header.get("device") != header["device"]:
        print(
            f"note: so far it was trained on the {saved.header.get('device')} backend, from here on the "
            f"{header['device']} backend; the two round differently"
        )
    if saved.header.get("precision", header["precision"]) != header["precision"]:
        print(
            f"note: so far it was trained in {saved.header['precision']}, from here on in {header['precision']}; "
            "the two round differently"
        )
    if saved.header.get("ranks", 1) != header["ranks"]:
        print(
            f"note: so far a batch was shared by {saved.header.get('ranks', 1)} ranks, from here on by "
            f"{header['ranks']}; the pictures and draws are the same, the sums round differently"
        )
    parameters = {name: saved.arrays.pop(name) for name in expected}
    return State(step, parameters, {name: saved.arrays.pop(f"momentum/{name}") for name in expected})


def _save(run_dir: RunDir, ops: ModuleType, log: MetricsLog, keep: int, state: State, header: dict[str, Any]) -> None:
    arrays = state.parameters | {f"momentum/{name}": value for name, value in state.momenta.items()}

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


def _header(config: Config, dataset: Dataset, device: str, precision: str, ranks: Ranks) -> dict[str, Any]:
    """What a checkpoint says of the run it belongs to."""
    return {
        "schema": 1,
        "config": to_dict(config),
        "data": fingerprint(dataset.manifest),
        "classes": len(dataset.classes),
        "wnids": [entry["wnid"] for entry in dataset.classes],
        "device": device,
        "precision": precision,
        "ranks": ranks.size,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _without_free(config: Config) -> Config:
    """The configuration with the settings that change no weight set to fixed values."""
    standard = type(config.train)()
    train = replace(config.train, **{name: getattr(standard, name) for name in _FREE})
    return replace(config, train=train, eval=type(config.eval)(), loader=type(config.loader)())
