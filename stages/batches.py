"""Which pictures a training batch has, in which order they are read, and which of them a rank computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np

from data.dataset import Dataset
from data.readahead import Piece, reading_ahead, total_memory
from data.sampling import (
    BLOCK,
    OPEN_BLOCKS,
    Augmentation,
    Crops,
    block_groups,
    block_order,
    epoch_order,
    group_ends,
    steps_per_epoch,
    training_crops,
)
from pipeline.config import Config
from pipeline.ranks import ALONE, Ranks
from stages.setup import jittered

_FITS: Final = 0.75  # of the memory; the rest is for the network and for others


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
            size=config.preprocess.size,
            crop=inp.crop,
            random_crop=inp.random_crop,
            flip=inp.flip,
            jitter=inp.jitter,
            directions=dataset.directions,
        )
        self._split = dataset.train
        # Two epochs at most are under way at a time; two threads that both come for a new one compute the same.
        self._order = lru_cache(maxsize=2)(self._epochs_order)
        self._group_ends = lru_cache(maxsize=2)(self._epochs_group_ends)

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

    def _epochs_order(self, epoch: int) -> np.ndarray:
        seed = self._config.seed
        if self._config.train.order == "blocks":
            return block_order(self._pictures, seed, epoch, BLOCK, OPEN_BLOCKS)
        return epoch_order(self._pictures, seed, epoch)

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

    def _epochs_group_ends(self, epoch: int) -> np.ndarray:
        return group_ends(self._groups(epoch), self._pictures, BLOCK)
