"""From a configuration and a preprocessed run to what training and evaluation work with: data, network, rates."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from data.manifest import read_manifest
from data.shards import Split, open_split, preprocess_command
from net.alexnet import alexnet
from net.layers import Layer, Shape
from net.network import Preparation, parameter_shapes
from pipeline.config import Config, at_epoch, difference, with_values
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir, read_json

_MOST_THREADS: Final = 12  # of the loader, unless asked for: more than one GPU can use
_RING: Final = 4 << 30  # bytes of batches that the loader's threads may fill at a time, unless asked for

# Names among a checkpoint's arrays; the others are the parameters'.
MEAN: Final = "mean"  # a mean picture: only imported weights bring their own
MOMENTUM: Final = "momentum/"  # before a parameter's name: its momentum


@dataclass(frozen=True)
class Dataset:
    """The preprocessed pictures and what was measured on them."""

    manifest: dict[str, Any]
    classes: list[dict[str, Any]]
    train: Split
    val: Split
    mean: np.ndarray  # float32 (size, size, 3), the training pictures' mean, 0..255
    directions: np.ndarray  # float64 (3, 3): eigenvector times standard deviation, a row each, 0..255


def open_dataset(run: RunDir) -> Dataset:
    """Open the shards of a run; refuses, with the command that mends it, what is missing or does not match."""
    manifest = read_manifest(run)
    remedy = f"make it again: {preprocess_command(run)}"
    return Dataset(
        manifest=manifest,
        classes=read_classes(run.preprocess / "classes.json", manifest["classes"], remedy),
        train=open_split(run.preprocess, manifest, "train"),
        val=open_split(run.preprocess, manifest, "val"),
        mean=read_mean(run.preprocess / "mean.npy", manifest["size"], remedy),
        directions=_read_directions(run.preprocess / "color.json", remedy),
    )


def require_stored(config: Config, dataset: Dataset, run: RunDir) -> None:
    """Refuse settings of ``preprocess`` other than those that the stored pictures were made with."""
    manifest = dataset.manifest
    made = {
        **manifest.get("made_with", {}).get("preprocess", {}),
        "size": manifest["size"],
        "filter": manifest["filter"],
    }
    differing = difference(with_values(config, {"preprocess": made}, str(run.preprocess)), config)
    if differing:
        raise PipelineError(
            f"the pictures in {run.preprocess} were made with other settings: {'; '.join(differing)}; "
            "leave them as they are, or preprocess into a new run (--run)"
        )


def require_size(config: Config, dataset: Dataset, run: RunDir) -> None:
    """Refuse a configuration made for stored pictures of another size."""
    stored = dataset.manifest["size"]
    if config.preprocess.size != stored:
        raise PipelineError(
            f"the pictures in {run.preprocess} have {stored} pixels a side, but preprocess.size is "
            f"{config.preprocess.size}; leave it as it is, or preprocess into a new run (--run)"
        )


def read_classes(path: Path, count: int | None, remedy: str) -> list[dict[str, Any]]:
    """The classes of ``classes.json``, each with ``wnid`` and ``words``; ``count`` is None where any number will do."""
    entries = read_json(path, remedy).get("classes")
    if (
        not isinstance(entries, list)
        or count not in (None, len(entries))
        or not all(isinstance(e, dict) and isinstance(e.get("wnid"), str) and "words" in e for e in entries)
    ):
        raise PipelineError(f"{path} does not describe {'' if count is None else f'{count} '}classes; {remedy}")
    return entries


def read_mean(path: Path, size: int, remedy: str) -> np.ndarray:
    """The mean picture of ``mean.npy``, float32 (size, size, 3)."""
    try:
        mean = np.load(path, allow_pickle=False, mmap_mode="r")  # a claimed shape allocates nothing
        if mean.dtype != np.float32 or mean.shape != (size, size, 3):
            raise ValueError(f"its type is {mean.dtype}, its shape {mean.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise PipelineError(f"cannot read {path} ({error}); {remedy}") from error
    return np.array(mean)


def _read_directions(path: Path, remedy: str) -> np.ndarray:
    """Eigenvector times standard deviation, a row each, 0..255."""
    color = read_json(path, remedy)
    try:
        values, vectors = (np.array(color[key], dtype=np.float64) for key in ("eigenvalues", "eigenvectors"))
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise PipelineError(f"{path} holds no eigenvalues and eigenvectors; {remedy}") from error
    if values.shape != (3,) or vectors.shape != (3, 3) or not np.isfinite(values).all() & np.isfinite(vectors).all():
        raise PipelineError(f"{path} holds other than three eigenvalues and eigenvectors; {remedy}")
    return vectors * (np.sqrt(np.maximum(values, 0)) * 255)[:, None]


def network_layers(config: Config, classes: int) -> tuple[Layer, ...]:
    """The recipe's network as a plain list of layers (``net.layers.fuse`` adapts it to a backend)."""
    options = {k: v for k, v in vars(config.network).items() if k not in ("weight_std", "bias")}
    layers = alexnet(classes, **options)
    shape = input_shape(config)
    for layer in layers:
        shape = layer.output_shape(shape)
        if min(shape) < 1:
            raise PipelineError(
                "input.crop is too small for this network: nothing is left of the picture after the last pool"
            )
    return layers


def parameter_names(arrays: Iterable[str]) -> list[str]:
    """Of the names of a checkpoint's arrays those of parameters."""
    return [name for name in arrays if name != MEAN and not name.startswith(MOMENTUM)]


def shapes(layers: Sequence[Layer], config: Config) -> dict[str, Shape]:
    """The shapes of all parameters."""
    return parameter_shapes(layers, input_shape(config))


def require_memory(
    ops: ModuleType, layers: Sequence[Layer], config: Config, batch: int, *, training: bool, views: int = 1
) -> None:
    """Refuse a batch that the backend's device has no memory for, where the backend can tell."""
    if hasattr(ops, "check_memory"):
        try:
            ops.check_memory(layers, input_shape(config), batch, training=training, views=views)
        except MemoryError as error:
            raise PipelineError(str(error)) from error


def loader_threads(config: Config, ops: ModuleType, crops: int) -> int:
    """The loader's threads for batches of ``crops``: as the settings say, else what suits the backend.

    The host's cores compute, unless the backend has a device of its own; that one takes more crops than a core can cut.
    """
    if config.loader.threads is not None:
        return config.loader.threads
    if not hasattr(ops, "replayable"):
        return 1
    room = _RING // (crops * config.input.crop**2 * 3)  # each thread fills a batch of its own
    return max(1, min(_MOST_THREADS, _cores() * 3 // 4, room))


def loader_slots(config: Config, threads: int) -> int:
    """Batches in training's ring: as the settings say, else one a thread, and three that wait or are in use."""
    return threads + 3 if config.loader.slots is None else config.loader.slots


def _cores() -> int:
    """Cores that this process, one of perhaps several ranks on a machine, may keep busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = os.environ.get("NUMBA_NUM_THREADS", "")  # pipeline.ranks shares the cores out by it
    return min(cores, int(share)) if share.isdecimal() else cores


def preparation(config: Config, mean: np.ndarray, ops: ModuleType, *, jittered: bool) -> Preparation:
    """How the backend turns crops into input; ``jittered`` is whether colour shifts are being drawn."""
    inp = config.input
    if inp.mean == "none":
        device_mean = None
    elif inp.mean == "image":
        device_mean = ops.asarray(mean)
    else:
        first = (mean.shape[0] - inp.crop) // 2
        centre = mean[first : first + inp.crop, first : first + inp.crop]
        device_mean = ops.asarray(np.ascontiguousarray(centre))
    scale = inp.scale / (1 + inp.jitter) if jittered and inp.jitter_rescale else inp.scale
    return Preparation(device_mean, scale, inp.bgr, inp.border)


def jittered(config: Config, epoch: int) -> bool:
    """Whether training in this epoch draws colour shifts."""
    inp = config.input
    return inp.jitter > 0 and (inp.jitter_epochs is None or epoch < inp.jitter_epochs)


def learning_rates(config: Config, names: Sequence[str], epoch: int) -> np.ndarray:
    """The learning rate of each parameter in this epoch, float32."""
    train = config.train
    weights = at_epoch(train.lr, epoch)
    biases = at_epoch(train.bias_lr, epoch)
    conv1 = at_epoch(train.conv1_lr, epoch)
    assert weights is not None  # checked when the configuration was read
    if biases is None:
        biases = weights * train.bias_lr_factor
    rates = [
        conv1 if conv1 is not None and n.startswith("conv1.") else (biases if n.endswith(".b") else weights)
        for n in names
    ]
    return np.array(rates, dtype=np.float32)


def decays(config: Config, names: Sequence[str]) -> dict[str, float]:
    """The weight decay of each parameter."""
    train = config.train
    return {n: train.weight_decay if n.endswith(".w") or train.bias_decay else 0.0 for n in names}


def input_shape(config: Config) -> Shape:
    """(height, width, channels) of the network's input."""
    side = config.input.crop + sum(config.input.border)
    return side, side, 3
