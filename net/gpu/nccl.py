"""Sums of gradients over several GPUs, one a process, by NCCL through CuPy.

The exchange runs on a stream of its own, beside the rest of the backward pass: a gradient's sum is queued when the
kernels that compute it have been, and the update's stream waits for it only after the last of them. fc8, fc7 and fc6,
which have 96 % of the bytes, are known first, and the convolutions' backward pass hides them.

Not run on GPUs yet: tested on the CPU with a stand-in for CuPy's NCCL, see ``docs/cluster.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, Final

import numpy as np

from net.backend import BackendUnavailableError
from net.gpu.arrays import dense
from net.gpu.device import current, event_on
from net.layers import Array

ADDRESS: Final = 128  # numbers in the tuple by which NCCL's ranks find each other

Gradients = Iterable[tuple[str, Array]]


def reduction(
    rank: int, size: int, broadcast: Callable[[np.ndarray], None]
) -> Callable[[Gradients], Iterator[tuple[str, Array]]]:
    """From a backward pass's gradients to their sums over all ranks.

    ``broadcast`` overwrites a host array with the first rank's; it carries NCCL's address. Every rank calls this, and
    the returned function, equally often.

    Raises
    ------
    BackendUnavailableError
        CuPy finds no NCCL, or the ranks cannot reach each other by it.
    """
    communicator = _communicator(rank, size, broadcast)
    nccl = current().cupy.cuda.nccl

    def reduce(gradients: Gradients) -> Iterator[tuple[str, Array]]:
        computing, sending = current().stream, _stream()
        sums: list[tuple[str, Array]] = []
        for name, gradient in gradients:
            gradient = dense(gradient)
            sending.wait_event(event_on(computing))
            at = gradient.data.ptr
            communicator.allReduce(at, at, gradient.size, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, sending.ptr)
            sums.append((name, gradient))
        # All sums have been queued, so their memory is in use on the sending stream until this event.
        computing.wait_event(event_on(sending))
        yield from sums

    return reduce


@cache
def _stream() -> Any:
    return current().cupy.cuda.Stream(non_blocking=True)


_communicators: dict[tuple[int, int], Any] = {}


def _communicator(rank: int, size: int, broadcast: Callable[[np.ndarray], None]) -> Any:
    """NCCL's communicator of all ranks, made once a process."""
    key = rank, size
    if key not in _communicators:
        try:
            from cupy.cuda import nccl

            # C's char, which CuPy makes these numbers of, has a sign on x86 and none on ARM: 16 bits hold both.
            address = np.zeros(ADDRESS, dtype=np.int16)
            if rank == 0:
                address[:] = nccl.get_unique_id()
            broadcast(address)
            _communicators[key] = nccl.NcclCommunicator(size, tuple(address.tolist()), rank)
        except (ImportError, AttributeError, RuntimeError) as error:
            raise BackendUnavailableError(
                f"rank {rank} cannot use NCCL ({str(error).splitlines()[0]}): "
                "python -m pip install nvidia-nccl-cu12 (or -cu13), and one GPU for each rank of a machine"
            ) from error
    return _communicators[key]
