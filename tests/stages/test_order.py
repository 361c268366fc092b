"""The order of an epoch: settled by size and memory, and in the block-wise one an exact resume and long reads only."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import loader
from data.dataset import Dataset, open_dataset
from data.manifest import read_manifest
from data.sampling import epoch_order
from data.split import Split, open_split
from pipeline.checkpoint import checkpoints
from pipeline.config import DEMO, Config
from pipeline.ranks import ALONE, Ranks
from pipeline.run_dir import RunDir, read_sealed
from stages import batches as batches_of
from tests.command_line import pipeline


def settings(config: Config, **train: object) -> Config:
    inp = dataclasses.replace(config.input, crop=67, border=(0, 0))
    return dataclasses.replace(
        config,
        preprocess=dataclasses.replace(config.preprocess, size=72),
        input=inp,
        train=dataclasses.replace(config.train, batch_size=4, **train),
    )


@pytest.fixture
def dataset(prepared: Path) -> Dataset:
    return open_dataset(RunDir(prepared))


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Blocks of three pictures, two open at a time: the 22 pictures in three shards make four groups."""
    monkeypatch.setattr(batches_of, "BLOCK", 3)
    monkeypatch.setattr(batches_of, "OPEN_BLOCKS", 2)


def one_of(rank: int, size: int) -> Ranks:
    return dataclasses.replace(ALONE, rank=rank, size=size)


def batches(dataset: Dataset, first: int, last: int) -> list[dict[str, bytes]]:
    plan = batches_of.TrainingPlan(settings(DEMO, order="blocks"), dataset)
    with plan.read_ahead(first, last) as ready:
        loaded = loader.load(dataset.train, ready, range(first, last), crop=67, largest=4, slots=3, threads=2)
        return [{name: array.tobytes() for name, array in batch.arrays.items()} for batch in loaded]


def test_a_resumed_run_in_block_order_gets_the_batches_of_the_undisturbed_one(dataset, small_blocks):
    whole = batches(dataset, 0, 18)
    for first in (1, 5, 6, 7, 13):
        assert batches(dataset, first, 18) == whole[first:]


def test_each_epoch_reads_and_uses_every_picture_once(dataset, small_blocks, monkeypatch):
    plan = batches_of.TrainingPlan(settings(DEMO, order="blocks"), dataset)
    for epoch in range(3):
        steps = range(6 * epoch, 6 * epoch + 6)
        assert sorted(np.concatenate([plan(step).index for step in steps]).tolist()) == list(range(22))
        groups = sorted({group for step in steps for group in plan._groups_of(step)})
        assert groups == list(range(4 * epoch, 4 * epoch + 4))
        read = Counter()
        for group in groups:
            for path, offset, length in plan._pieces(group):
                read.update((path.name, byte) for byte in range(offset, offset + length, 72 * 72 * 3))
        assert set(read.values()) == {1}
        assert sum(read.values()) == 22


def test_a_step_waits_for_the_groups_its_pictures_lie_in(dataset, small_blocks):
    plan = batches_of.TrainingPlan(settings(DEMO, order="blocks"), dataset)
    for step in range(12):
        places = {
            (path.name, byte)
            for group in plan._groups_of(step)
            for path, offset, length in plan._pieces(group)
            for byte in range(offset, offset + length, 72 * 72 * 3)
        }
        for row in plan(step).index.tolist():
            [(path, offset, _)] = dataset.train.pieces(row, row + 1)
            assert (path.name, offset) in places


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_ranks_share_a_batch_whatever_their_number(dataset, size):
    config = settings(DEMO)
    whole = batches_of.TrainingPlan(config, dataset)
    ranks = [batches_of.TrainingPlan(config, dataset, one_of(rank, size)) for rank in range(size)]
    for step in (0, 5, 11):  # the last two have two pictures
        parts = [plan.part(step) for plan in ranks]
        assert sum(part.counted for part in parts) == parts[0].total == len(whole(step).index) == (4, 2, 2)[step // 5]
        for part, plan in zip(parts, ranks, strict=True):
            crops = plan(step)
            assert 1 <= part.last - part.first == len(crops.index) <= plan.largest
            assert crops.index.tolist() == whole(step).index[part.first : part.last].tolist()
            assert crops.corner.tolist() == whole(step).corner[part.first : part.last].tolist()
        counted = [place for part in parts for place in range(part.first, part.first + part.counted)]
        assert counted == list(range(parts[0].total))


def test_the_order_is_that_of_the_seed_and_the_epoch(dataset):
    plan = batches_of.TrainingPlan(dataclasses.replace(settings(DEMO), seed=3), dataset)
    for epoch in (0, 1):
        found = np.concatenate([plan(step).index for step in range(6 * epoch, 6 * epoch + 6)])
        assert found.tolist() == epoch_order(22, 3, epoch).tolist()


def test_colour_shifts_are_along_the_measured_directions(dataset):
    config, red = settings(DEMO), np.array([[40.0, 0, 0]] * 3)
    config = dataclasses.replace(config, input=dataclasses.replace(config.input, jitter=0.1, jitter_epochs=None))
    shift = batches_of.TrainingPlan(config, dataclasses.replace(dataset, directions=red))(0).shift
    assert shift[:, 0].all()
    assert not shift[:, 1:].any()


def test_colour_shifts_end_with_the_jitters_epochs(dataset):
    config = settings(DEMO)
    ends = dataclasses.replace(config, input=dataclasses.replace(config.input, jitter=0.1, jitter_epochs=1))
    plan = batches_of.TrainingPlan(ends, dataset)
    assert [bool(plan(step).shift.any()) for step in (0, 5, 6, 12)] == [True, True, False, False]


def test_pieces_are_the_bytes_of_the_pictures(prepared: Path):
    split: Split = open_split(prepared / "preprocess", read_manifest(RunDir(prepared)), "train")
    found = b"".join(path.read_bytes()[offset : offset + length] for path, offset, length in split.pieces(8, 22))
    assert found == b"".join(split.row(i).tobytes() for i in range(8, 22))
    assert [length // (72 * 72 * 3) for _, _, length in split.pieces(8, 22)] == [2, 10, 2]


def test_the_order_follows_from_size_and_memory_and_can_be_overridden(dataset, monkeypatch, capsys):
    assert batches_of.with_order(settings(DEMO), dataset).train.order == "uniform"
    assert capsys.readouterr().out == ""
    size = sum(images.nbytes for images in dataset.train.images)
    monkeypatch.setattr(batches_of, "total_memory", lambda: size)
    assert batches_of.with_order(settings(DEMO), dataset).train.order == "blocks"
    assert "do not fit into" in capsys.readouterr().out
    assert batches_of.with_order(settings(DEMO, order="uniform"), dataset).train.order == "uniform"


def test_training_in_block_order_resumes_to_the_same_bytes(run: Path, tmp_path: Path):
    whole = shutil.copytree(run, tmp_path / "whole")
    order = ("--set", "train.order=blocks")
    pipeline("--stage", "train", "--run", whole, "--steps", 2, *order).done()
    pipeline("--stage", "train", "--run", run, "--steps", 1, *order).done()
    pipeline("--stage", "train", "--run", run, "--resume", "--steps", 1).done()
    assert read_sealed(run / "config.json", "")["train"]["order"] == "blocks"
    ours, theirs = (checkpoints(folder / "train")[-1].read_bytes() for folder in (run, whole))
    assert ours == theirs
    pipeline("--stage", "train", "--run", run, "--resume", "--steps", 1, "--set", "train.order=uniform").refused(
        r"train.order \(blocks there, uniform here\)"
    )
