"""What of ``pipeline.ranks`` and ``pipeline.mpi`` needs no MPI: parts of a batch, buckets, what a launcher says."""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import mpi, ranks
from pipeline.errors import PipelineError


def of(rank: int, size: int) -> ranks.Ranks:
    return ranks.Ranks(**{**vars(ranks.ALONE), "rank": rank, "size": size})


@given(st.integers(0, 300), st.integers(1, 20))
def test_parts_cover_a_batch_once_and_are_even(count: int, size: int) -> None:
    parts = [of(rank, size).part(count) for rank in range(size)]
    assert [place for first, last in parts for place in range(first, last)] == list(range(count))
    lengths = [last - first for first, last in parts]
    assert max(lengths) - min(lengths) <= 1


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 100))
def test_buckets_keep_every_gradient_and_large_ones_uncopied(sizes: list[int], least: int) -> None:
    gradients = [(f"g{i}", np.full((n, 2), i, np.float32)) for i, n in enumerate(sizes)]
    found = {}
    for bucket in mpi.buckets(iter(gradients), least):
        if not bucket:
            continue
        flat = mpi.packed(bucket)
        if len(bucket) == 1:
            assert np.shares_memory(flat, bucket[0][1]) or not flat.size
        flat += 1
        found |= {name: value.copy() for name, value in mpi.unpacked(flat, bucket)}
    assert found.keys() == dict(gradients).keys()
    for i, n in enumerate(sizes):
        np.testing.assert_array_equal(found[f"g{i}"], np.full((n, 2), i + 1))


def test_a_bucket_is_handed_out_as_soon_as_it_is_full() -> None:
    taken = []

    def gradients():
        for i, size in enumerate((10, 2, 2, 10, 1, 4)):
            taken.append(i)
            yield str(i), np.zeros(size, np.float32)

    seen = [([name for name, _ in bucket], len(taken)) for bucket in mpi.buckets(gradients(), 16)]
    assert seen == [(["0"], 1), ([], 2), (["1", "2"], 3), (["3"], 4), ([], 5), (["5"], 6), (["4"], 6)]


def test_each_rank_of_a_machine_takes_one_gpu() -> None:
    assert [mpi.card_of(None, local, 3) for local in range(3)] == ["0", "1", "2"]
    assert [mpi.card_of("4,6", local, 3) for local in range(3)] == ["4", "6", "4"]
    assert mpi.card_of("MIG-1,MIG-2", 1, 2) == "MIG-2"
    assert mpi.card_of(None, 0, 1) is None
    assert mpi.card_of("2", 1, 4) is None, "the launcher has given it one"
    assert mpi.card_of("", 1, 4) is None, "GPUs that have been hidden stay hidden"


def test_what_launchers_say() -> None:
    assert mpi.launched({}) == 1
    assert mpi.launched({"PMI_SIZE": "4", "PMI_RANK": "2"}) == 4
    assert mpi.launched({"OMPI_COMM_WORLD_SIZE": "2"}) == 2
    assert mpi.launched({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "8"}) == 8
    assert mpi.launched({"SLURM_NTASKS": "8"}) == 1, "inside sbatch, but not started by srun"
    assert mpi.launched({"SLURM_STEP_NUM_TASKS": "8"}) == 1, "started by srun, but without MPI"
    assert mpi.launched({"PMI_SIZE": "many"}) == 1


def test_how_long_a_rank_waits_for_the_others() -> None:
    assert mpi.silence({}) == mpi.SILENCE
    assert mpi.silence({"ALEXNET_SILENCE": "2.5"}) == 2.5
    for text in ("", "0", "-1", "nan", "soon"):
        with pytest.raises(PipelineError, match="not a positive number"):
            mpi.silence({"ALEXNET_SILENCE": text})


def test_alone_changes_nothing() -> None:
    a = np.arange(3.0)
    ranks.ALONE.add(a)
    ranks.ALONE.broadcast(a)
    assert a.tolist() == [0, 1, 2]
    assert ranks.ALONE.largest(7) == 7
    assert ranks.ALONE.gather(a).tolist() == [[0, 1, 2]]
    assert ranks.ALONE.mean(np.array([1, 2], np.float32)) == 1.5
    assert ranks.ALONE.mean(np.array([1e9, 3, -1e9], np.float32)) == 1  # as exact as the sum over several ranks
    assert list(ranks.ALONE.reduce([("w", a)])) == [("w", a)]


def test_without_mpi4py_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    with pytest.raises(PipelineError, match=r"2 ranks were started.*\[cluster\]"), mpi.joined():
        pass


def test_every_rank_says_the_same_of_which_differ() -> None:
    """They end at different times, and any of them may be the one that is heard."""
    others = [b"as here", b"other", b"as here", b"another"]
    digests = np.stack([np.frombuffer(hashlib.sha256(value).digest(), np.uint8) for value in others])
    for rank, value in enumerate(others):
        one = replace(of(rank, 4), gather=lambda own: digests)
        with pytest.raises(PipelineError, match=r"^the settings differ: rank 1, 3 of 4 differs from rank 0$"):
            one.require_same(lambda value=value: value, "the settings differ")


class Leaving:
    """A communicator at the end of a run: what all ranks say, and after how many looks it has come."""

    def __init__(self, rank: int, failed: list[bool], looks: float) -> None:
        self.rank, self.failed, self.looks = rank, failed, looks

    def Get_size(self) -> int:
        return len(self.failed)

    def Iallgather(self, said: np.ndarray, heard: np.ndarray) -> Leaving:
        assert bool(said[0]) == self.failed[self.rank]
        heard[:] = self.failed
        return self

    def Test(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize(
    ("rank", "failed", "spoken_for"),
    [
        (1, [False, False], True),
        (0, [True, False], True),  # the first rank speaks for itself
        (1, [True, True], True),
        (1, [False, True], False),  # the first rank has nothing to say of what went wrong here
    ],
)
def test_a_rank_that_fails_speaks_where_the_first_does_not(
    rank: int, failed: list[bool], spoken_for: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpi, "_orderly", False)
    assert mpi._leave(Leaving(rank, failed, 2), failed=failed[rank]) == spoken_for
    assert mpi._orderly


def test_a_rank_that_fails_waits_for_the_others_a_moment_and_one_that_is_done_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mpi, "_orderly", False)
    monkeypatch.setattr(mpi, "PATIENCE", 0.0)
    assert not mpi._leave(Leaving(1, [False, True], math.inf), failed=True)
    assert not mpi._orderly, "the job is to be aborted"
    assert mpi._leave(Leaving(1, [False, False], 5), failed=False)
    assert mpi._orderly


@pytest.mark.parametrize("orderly", [True, False])
def test_the_process_ends_mpi_or_the_whole_job(orderly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    fake = SimpleNamespace(Finalize=lambda: done.append("finalized"), COMM_WORLD=SimpleNamespace(Abort=done.append))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=fake))
    monkeypatch.setattr(mpi, "_orderly", orderly)
    mpi._end()
    assert done == (["finalized"] if orderly else [1])
