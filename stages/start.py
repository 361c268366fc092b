"""How a training run begins: with weights drawn anew or from a file, or where its newest sound checkpoint ends.

Whatever a start can be refused for comes first, on every rank: data, settings, the backend and its memory, the state to
begin with. Until then the run directory is only read. So a start that is refused leaves the run as it was: its
configuration, and with it ``--resume``, and what ``--restart`` would have moved aside.
"""

from __future__ import annotations

import contextlib
import math
import platform
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from data.dataset import Dataset, open_dataset, require_stored
from data.manifest import data_fingerprint
from net.layers import Layer, Shape
from net.network import Reduce, drawing, initial_parameters, zeros
from pipeline.checkpoint import (
    Checkpoint,
    checkpoints,
    newest_sound,
    note_best,
    note_latest,
    prune,
    restore_best,
    step_of,
    strays,
    superfluous,
)
from pipeline.config import Config, Eval, Loader, Preprocess, Train
from pipeline.config_values import difference, from_dict, to_dict
from pipeline.errors import PipelineError
from pipeline.metrics import cut_back
from pipeline.progress import volume
from pipeline.ranks import Ranks
from pipeline.run_dir import RunDir, fingerprint, make_folder, move_aside, remove, write_sealed
from stages.batches import TrainingPlan, with_order
from stages.pretrained import take_weights
from stages.setup import MOMENTUM, network_layers, require_memory, shapes

# Settings that may differ between the run so far and its continuation: they change no weight.
_FREE: Final = (
    "epochs",
    "checkpoint_every",
    "save_every",
    "validate_every",
    "log_every",
    "keep_checkpoints",
    "plateau_steps",
)

_PRETRAINED: Final = "pretrained"  # entry of a checkpoint's header: the file whose weights training began with


@dataclass
class State:
    """The numbers training changes: steps done, parameters and momenta (on the backend's device)."""

    step: int
    parameters: dict[str, Any]
    momenta: dict[str, Any]


@dataclass(frozen=True)
class Begun:
    """What training computes with and on: the backend, how gradients are summed over the ranks, and the state."""

    ops: ModuleType
    reduce: Reduce | None  # None for a process on its own
    state: State
    header: dict[str, Any]  # what every checkpoint says of the run it belongs to


@dataclass(frozen=True)
class Training:
    """What is trained, on what and by whom: the same from the first step to the last."""

    config: Config  # with its order settled
    run_dir: RunDir
    dataset: Dataset
    layers: tuple[Layer, ...]
    shapes: dict[str, Shape]  # of all parameters
    plan: TrainingPlan
    ranks: Ranks
    header: dict[str, Any]  # what a checkpoint to go on from must agree with


def require_way_on(folder: Path, *, resume: bool) -> None:
    """Refuse to begin anew where training has been, and to go on from what no training has written."""
    found = checkpoints(folder)
    if found and step_of(found[-1]) == 0:  # training's own come after a step
        raise PipelineError(
            f"{found[-1]} holds imported weights, which have no momenta to go on with; begin with them in a new run: "
            f"--stage train --weights {shlex.quote(str(found[-1]))} --run DIR (or train here from weights drawn anew "
            "with --restart: the imported ones are moved aside, not deleted)"
        )
    if found and not resume:
        raise PipelineError(
            f"{folder} holds checkpoints up to step {step_of(found[-1])}; add --resume to go on from there, or "
            "--restart to start over (the old ones are moved aside, not deleted)"
        )


def open_training(config: Config, run_dir: RunDir, device: str, precision: str, ranks: Ranks) -> Training:
    """Open the data of a run and settle what to train on them; refuses what does not fit together."""
    dataset = open_dataset(run_dir)
    require_stored(config, dataset, run_dir)
    layers = network_layers(config, len(dataset.classes))
    config = with_order(config, dataset)
    header = _header(config, dataset, device, precision, ranks)
    ranks.require_same(lambda: fingerprint(header).encode(), "the ranks have different data, settings or software")
    plan = TrainingPlan(config, dataset, ranks)
    return Training(config, run_dir, dataset, layers, shapes(layers, config), plan, ranks, header)


def begin(
    training: Training, load_backend: Callable[[], ModuleType], last_step: Callable[[int], int], *, resume: bool
) -> Begun:
    """Load the backend and put on its device the state to train on from.

    The state is the newest sound checkpoint's when resuming, a fresh one otherwise. ``last_step`` gives the step at
    which training will end, from the number of those that are done.
    """
    config, ranks = training.config, training.ranks
    how = (training.shapes, config.network.weight_std, config.network.bias, config.seed)
    with contextlib.ExitStack() as beside:
        fresh: Callable[[], dict[str, np.ndarray]] = partial(initial_parameters, *how)
        if ranks.leads and not resume:
            # Loading the backend takes most of a second and one core, and so does drawing: both at once.
            fresh = beside.enter_context(drawing(*how))
        ops = load_backend()
        largest = min(training.plan.largest, len(training.dataset.train))
        require_memory(ops, training.layers, config, largest, training=True)
        pictures = min(config.eval.batch_size, len(training.dataset.val))  # in the validation at an epoch's end
        require_memory(ops, training.layers, config, pictures, training=False)
        if hasattr(ops, "warm_up"):
            ops.warm_up()
        reduce = _reduction(ops, ranks)
        saved = _newest(training) if ranks.leads and resume else None
        header = training.header
        if saved is not None:
            state = _saved_state(saved, training.shapes)
            if _PRETRAINED in saved.header:
                header = header | {_PRETRAINED: saved.header[_PRETRAINED]}
        else:
            state = State(0, fresh() if ranks.leads else zeros(training.shapes), zeros(training.shapes))
            if ranks.leads and config.train.weights is not None:
                origin = take_weights(Path(config.train.weights), config, header["wnids"], state.parameters)
                header = header | {_PRETRAINED: origin}
        if ranks.leads and last_step(state.step) > state.step:
            _require_room(training, saved)
        state = _on_device(ops, _shared(ranks, state))
    ranks.wait()  # a rank that cannot begin does not come here
    if ranks.leads:
        _make_ready(training, saved)
    return Begun(ops, reduce, state, header)


def _reduction(ops: ModuleType, ranks: Ranks) -> Reduce | None:
    """How gradients become their sums over all ranks: by the device's own means where it has them."""
    if ranks.size == 1:
        return None
    return ops.reduction(ranks.rank, ranks.size, ranks.broadcast) if hasattr(ops, "reduction") else ranks.reduce


def _newest(training: Training) -> Checkpoint | None:
    """The checkpoint to go on from, None where there is none yet; refuses one that is not of this training."""
    folder = training.run_dir.train
    saved, complaints = newest_sound(folder)
    for complaint in complaints:
        print(f"warning: {complaint}")
    if saved is not None:
        _require_same_run(training, saved)
    elif complaints:
        raise PipelineError(
            f"no checkpoint in {folder} can be read; start over with --restart (the old ones are moved aside)"
        )
    else:
        print(f"there is nothing to resume in {folder}: training starts from the beginning")
    return saved


def _require_same_run(training: Training, saved: Checkpoint) -> None:
    if saved.header.get("data") != training.header["data"]:
        raise PipelineError(
            f"{saved.path} was trained on other data than {training.run_dir.preprocess} holds now; "
            "restore that data, or start a new run with --run"
        )
    before = from_dict(saved.header["config"], str(saved.path))
    if before.train.order == "auto":  # written before there was another order
        before = replace(before, train=replace(before.train, order="uniform"))
    differing = difference(_without_free(before), _without_free(training.config))
    if differing:
        raise PipelineError(
            f"{saved.path} was trained with other settings: {'; '.join(differing)}. "
            "Resume with the settings of the run (leave out --recipe, --config, --set, --seed and --weights), "
            "or start a new run with --run"
        )
    names = {f"{prefix}{name}": shape for prefix in ("", MOMENTUM) for name, shape in training.shapes.items()}
    if {name: array.shape for name, array in saved.arrays.items()} != names:
        raise PipelineError(f"{saved.path} holds other arrays than this network has; start a new run with --run")


def _require_room(training: Training, saved: Checkpoint | None) -> None:
    """Refuse a disk that has no room for the next checkpoint, which is written before older ones are removed."""
    folder, keep = training.run_dir.train, training.config.train.keep_checkpoints
    size = 2 * 4 * sum(math.prod(shape) for shape in training.shapes.values())  # weights and momenta, float32
    if saved is not None:
        going = superfluous(folder, keep, saved.path)
    else:
        going = [] if checkpoints(folder) else strays(folder)  # checkpoints and all are moved aside, on the same disk
    free = shutil.disk_usage(folder if folder.exists() else training.run_dir.root).free
    free += sum(path.stat().st_size for path in going)
    if size > free:
        raise PipelineError(
            f"the disk of {folder} has {volume(free)} free, but a checkpoint needs {volume(size)}; "
            "free some space or choose another place with --run"
        )
    there = 0 if saved is None else len(set(checkpoints(folder)) - set(going))
    later = (keep + 2 - there) * size  # the best may be none of the newest, and one more is being written
    if later > free:
        print(
            f"note: the disk of {folder} has {volume(free)} free, but in time the checkpoints may need {volume(later)} "
            f"(train.keep_checkpoints is {keep})"
        )


def _saved_state(saved: Checkpoint, expected: dict[str, Shape]) -> State:
    """The checkpoint's state, whose arrays it gives up."""
    parameters = {name: saved.arrays.pop(name) for name in expected}
    momenta = {name: saved.arrays.pop(f"{MOMENTUM}{name}") for name in expected}
    return State(saved.header["step"], parameters, momenta)


def _shared(ranks: Ranks, state: State) -> State:
    """The first rank's state on all ranks: it alone reads checkpoints and draws."""
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


def _make_ready(training: Training, saved: Checkpoint | None) -> None:
    """Make the run directory that of this start: its metrics and checkpoints end where training begins."""
    folder = training.run_dir.train
    if saved is not None:
        _take_up(training, saved)
    else:
        if checkpoints(folder):  # so --restart was given: else they would have been resumed from or refused
            print(f"started over; the old checkpoints and metrics are in {move_aside(folder)}")
        make_folder(folder)
        for stray in strays(folder):
            remove(stray)
        cut_back(folder / "metrics.jsonl", 0)
    write_sealed(training.run_dir.config, to_dict(training.config))


def _take_up(training: Training, saved: Checkpoint) -> None:
    folder, step, header = training.run_dir.train, saved.header["step"], training.header
    cut_back(folder / "metrics.jsonl", step)
    # What a crash between a checkpoint and its indexes left undone.
    note_latest(folder, saved.path)
    restore_best(folder, saved.path)
    validation = saved.header.get("validation")
    if validation is not None:
        note_best(folder, saved.path, step, validation["top1"])
    prune(folder, training.config.train.keep_checkpoints, saved.path)
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


def _header(config: Config, dataset: Dataset, device: str, precision: str, ranks: Ranks) -> dict[str, Any]:
    """What a checkpoint says of the run it belongs to."""
    return {
        "schema": 1,
        "config": to_dict(config),
        "data": data_fingerprint(dataset.manifest),
        "classes": len(dataset.classes),
        "wnids": [entry["wnid"] for entry in dataset.classes],
        "device": device,
        "precision": precision,
        "ranks": ranks.size,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _without_free(config: Config) -> Config:
    """The configuration with the settings that change no weight set to fixed values.

    What ``preprocess`` decides is in the data, which are compared as such.
    """
    train = replace(config.train, **{name: getattr(Train(), name) for name in _FREE})
    return replace(config, train=train, preprocess=Preprocess(), eval=Eval(), loader=Loader())
