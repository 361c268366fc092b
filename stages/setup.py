"""From a configuration and a preprocessed run to what training, evaluation and prediction work with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from data.manifest import read_manifest
from data.readahead import Piece, reading_ahead, total_memory
from data.sampling import (
    BLOCK,
    OPEN_BLOCKS,
    Augmentation,
    Crops,
    block_groups,
    block_order,
    epoch_order,
    steps_per_epoch,
    training_crops,
)
from data.shards import Split, open_split
from net.alexnet import alexnet
from net.layers import Layer, Shape
from net.network import Preparation, parameter_shapes
from pipeline.config import Config, at_epoch, difference, with_values
from pipeline.errors import PipelineError
from pipeline.ranks import ALONE, Ranks
from pipeline.run_dir import RunDir, read_json

_FITS: Final = 0.75  # of the memory; the rest is for the network and for others
_MOST_THREADS: Final = 12  # of the loader, unless asked for: more than one GPU can use
_RING: Final = 4 << 30  # bytes of batches that the loader's threads may fill at a time, unless asked for
MEAN: Final = "mean"  # name of a mean picture among a checkpoint's arrays: only imported weights bring their own


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
    remedy = f"make it again: python run_pipeline.py --stage preprocess --run {run.root}"
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


def with_order(config: Config, dataset: Dataset) -> Config:
    """The configuration with ``train.order`` settled: block-wise where the training pictures do not fit into memory.

    What was settled is part of the run from then on: a resumed run keeps its order on a machine with other memory.
    """
    if config.train.order != "auto":
        return config
    size, memory = sum(images.nbytes for images in dataset.train.images), total_memory()
    fits = size <= _FITS * memory
    if not fits:
        print(
            f"train: {size / 1e9:.1f} GB of training pictures do not fit into {memory / 1e9:.1f} GB of memory: they "
            "are used block by block (train.order=blocks; --set train.order=uniform would draw from the whole set)"
        )
    return replace(config, train=replace(config.train, order="uniform" if fits else "blocks"))


@dataclass(frozen=True)
class Part:
    """What one rank computes of a batch of ``total`` pictures: those at the places ``first`` to ``last - 1``.

    ``counted`` of them count. A rank for which the batch has no picture computes a neighbour's with the weight 0,
    so that it takes the same way through the network as the others.
    """

    first: int
    last: int
    counted: int
    total: int


class TrainingPlan:
    """Which crops a rank takes of the training batch of a given step; safe to ask from several loader threads."""

    def __init__(self, config: Config, dataset: Dataset, ranks: Ranks = ALONE) -> None:
        self._config, self._ranks = config, ranks
        self._pictures = len(dataset.train)
        self.steps_per_epoch = steps_per_epoch(self._pictures, config.train.batch_size)
        inp = config.input
        self._how = Augmentation(
            config.preprocess.size, inp.crop, inp.random_crop, inp.flip, inp.jitter, dataset.directions
        )
        self._orders: dict[int, np.ndarray] = {}
        self._split = dataset.train
        self._ends: dict[int, np.ndarray] = {}

    def __call__(self, step: int) -> Crops:
        epoch, place = divmod(step, self.steps_per_epoch)
        start, part = place * self._config.train.batch_size, self.part(step)
        how = self._how if jittered(self._config, epoch) else replace(self._how, jitter=0.0)
        order, seed = self._order(epoch), self._config.seed
        return training_crops(order, start + part.first, start + part.last, seed, epoch, how)

    def part(self, step: int) -> Part:
        """This rank's part of the batch."""
        size = self._config.train.batch_size
        total = min(size, self._pictures - step % self.steps_per_epoch * size)
        first, last = self._ranks.part(total)
        if first < last:
            return Part(first, last, last - first, total)
        first = min(first, total - 1)
        return Part(first, first + 1, 0, total)

    @property
    def largest(self) -> int:
        """Pictures in the largest part of a batch."""
        return -(-self._config.train.batch_size // self._ranks.size)

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.get(epoch)
        if order is None:
            seed = self._config.seed
            if self._config.train.order == "blocks":
                order = block_order(self._pictures, seed, epoch, BLOCK, OPEN_BLOCKS)
            else:
                order = epoch_order(self._pictures, seed, epoch)
            # Two epochs at most are under way at a time. Replacing the dictionary is one atomic assignment; two
            # threads that both come here compute the same order.
            self._orders = {epoch: order, **{e: o for e, o in self._orders.items() if e == epoch - 1}}
        return order

    @contextmanager
    def read_ahead(self, first: int, last: int) -> Iterator[Callable[[int], Crops]]:
        """This plan for the steps ``first`` to ``last - 1``, with the disk read ahead where the order is block-wise."""
        if self._config.train.order != "blocks":
            yield self
            return
        with reading_ahead(self, self._groups_of, self._pieces, first, last) as plan:
            yield plan

    def _groups_of(self, step: int) -> range:
        epoch, place = divmod(step, self.steps_per_epoch)
        size = self._config.train.batch_size
        ends = self._group_ends(epoch)
        first, last = np.searchsorted(ends, [place * size, min((place + 1) * size, self._pictures) - 1], side="right")
        return range(epoch * len(ends) + int(first), epoch * len(ends) + int(last) + 1)

    def _pieces(self, group: int) -> list[Piece]:
        blocks = -(-self._pictures // BLOCK)
        epoch, place = divmod(group, -(-blocks // OPEN_BLOCKS))
        chosen = np.flatnonzero(self._groups(epoch) == place).tolist()
        rows = [(block * BLOCK, min((block + 1) * BLOCK, self._pictures)) for block in chosen]
        return [piece for first, last in rows for piece in self._split.pieces(first, last)]

    def _groups(self, epoch: int) -> np.ndarray:
        return block_groups(self._pictures, self._config.seed, epoch, BLOCK, OPEN_BLOCKS)

    def _group_ends(self, epoch: int) -> np.ndarray:
        """The position in the epoch at which each group ends."""
        ends = self._ends.get(epoch)
        if ends is None:
            sizes = np.full(-(-self._pictures // BLOCK), BLOCK)
            sizes[-1] = self._pictures - BLOCK * (len(sizes) - 1)
            ends = np.cumsum(np.bincount(self._groups(epoch), weights=sizes))
            self._ends = {epoch: ends, **{e: old for e, old in self._ends.items() if e == epoch - 1}}
        return ends


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
