"""Several processes as one run: who takes which part of a batch, and what they can say to each other.

``mpiexec -n 4 python run_pipeline.py --stage train`` starts four processes, the ranks. ``pipeline.mpi.joined`` gives
each a :class:`Ranks`: its number and a few plain functions. A process on its own gets :data:`ALONE`, the same value
with one rank, whose functions have nothing to do.

All ranks must call the collective functions in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from pipeline.errors import PipelineError

Gradients = Iterable[tuple[str, np.ndarray]]


@dataclass(frozen=True)
class Ranks:
    """A process's place among the processes of a run, and how it talks to them.

    Attributes
    ----------
    rank, size : int
        Its number, from 0, and how many there are.
    add : callable
        Sum an array over all ranks, in place.
    unite : callable
        Combine an array of all ranks bit by bit with OR, in place: each has filled in some rows and left the others 0.
    broadcast : callable
        Overwrite an array with the first rank's.
    largest : callable
        The largest of the ranks' whole numbers.
    gather : callable
        The arrays of all ranks, of one shape, one a row.
    wait : callable
        Wait until every rank has come here.
    meet : callable
        Wait likewise after work that took this rank so many seconds; a slower machine may take ten times as long.
    watched : callable
        A context in which something else waits for other ranks, such as a GPU: like these functions it ends the job
        when that lasts too long.
    reduce : callable
        From a backward pass's gradients, as they become known, to their sums over all ranks. Host arrays only.
    """

    rank: int
    size: int
    add: Callable[[np.ndarray], None]
    unite: Callable[[np.ndarray], None]
    broadcast: Callable[[np.ndarray], None]
    largest: Callable[[int], int]
    gather: Callable[[np.ndarray], np.ndarray]
    wait: Callable[[], None]
    meet: Callable[[float], None]
    watched: Callable[[], contextlib.AbstractContextManager[None]]
    reduce: Callable[[Gradients], Iterator[tuple[str, np.ndarray]]]

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    def part(self, count: int) -> tuple[int, int]:
        """The first of this rank's among ``count`` things in order, and the one after its last."""
        return self.rank * count // self.size, (self.rank + 1) * count // self.size

    def mean(self, values: np.ndarray) -> float:
        """The mean over all ranks' values, of which a rank may have none."""
        if self.size == 1:
            return float(np.mean(values, dtype=np.float64))
        sums = np.array([np.sum(values, dtype=np.float64), len(values)])
        self.add(sums)
        return float(sums[0] / sums[1])

    def require_same(self, value: Callable[[], bytes], complaint: str) -> None:
        """Refuse to go on where ``value()`` is not the same on all ranks.

        Raises
        ------
        PipelineError
            On every rank: ``complaint``, and which ranks differ from the first.
        """
        if self.size == 1:
            return
        digests = self.gather(np.frombuffer(hashlib.sha256(value()).digest(), dtype=np.uint8))
        other = [str(rank) for rank in range(self.size) if (digests[rank] != digests[0]).any()]
        if other:
            raise PipelineError(f"{complaint}: rank {', '.join(other)} of {self.size} differs from rank 0")


def _nothing(_: np.ndarray) -> None:
    pass


ALONE: Final = Ranks(
    rank=0,
    size=1,
    add=_nothing,
    unite=_nothing,
    broadcast=_nothing,
    largest=int,
    gather=lambda a: a[np.newaxis],
    wait=lambda: None,
    meet=lambda took: None,
    watched=contextlib.nullcontext,
    reduce=iter,
)
