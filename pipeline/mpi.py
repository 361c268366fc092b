"""The ranks of a run over MPI: how they join, exchange gradients, look after each other and leave.

The only module that knows MPI; what the others see of it is a :class:`pipeline.ranks.Ranks`. Only whole buffers travel,
never pickled objects. A process without a launcher needs no MPI.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import numpy as np

from pipeline.errors import PipelineError
from pipeline.ranks import ALONE, Gradients, Ranks

_Bucket = list[tuple[str, np.ndarray]]  # gradients that travel together
_Watched = Callable[..., contextlib.AbstractContextManager[None]]  # see _watch

BUCKET: Final = 4 << 20  # bytes; smaller gradients travel together, larger ones on their own and without a copy
SILENCE: Final = 600.0  # seconds after which a rank takes the others for lost; $ALEXNET_SILENCE where it is set
SLOWER: Final = 10  # a rank may take so many times as long as another for its share of an evaluation
PATIENCE: Final = 2.0  # seconds in which the other ranks are expected to end too, before the job is aborted


def launched(environment: Mapping[str, str]) -> int:
    """How many ranks the launcher that started this process says there are; 1 without a launcher."""
    size = environment.get("PMI_SIZE") or environment.get("OMPI_COMM_WORLD_SIZE")  # MPICH, Slurm's pmi2; Open MPI
    if size is None and "PMIX_RANK" in environment:  # srun --mpi=pmix
        size = environment.get("SLURM_STEP_NUM_TASKS")
    return int(size) if size and size.isdecimal() else 1


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Take part in the run that mpiexec or srun started, or be alone.

    Only the first rank prints. Where a rank leaves by an exception that the first rank does not share, it may print
    again and the whole job is aborted when the process ends, so that nobody waits for it for ever.

    Raises
    ------
    PipelineError
        The launcher says that there are several ranks, but mpi4py is not installed or finds another MPI.
    """
    count = launched(os.environ)
    if count == 1:
        yield ALONE
        return
    world = _start(count)
    ranks = _ranks(world)
    _share_machine(world)
    # Messages of the end must not meet those of the run that other ranks may still be in.
    leaving = world.Dup()
    spoken = sys.stdout, sys.stderr
    if not ranks.leads:  # to the end of the process: what all ranks have to say at the end, the first one says
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield ranks
    except BaseException:
        if not _leave(leaving, failed=True):
            sys.stdout, sys.stderr = spoken
            print(f"rank {ranks.rank} of {ranks.size}, on {socket.gethostname()}, ends the job:", file=sys.stderr)
        raise
    _leave(leaving, failed=False)


def _start(count: int) -> Any:
    """MPI's communicator of all ranks, and what happens at the end of the process."""
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # whether the end is orderly is known in _leave
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise PipelineError(
            f"{count} ranks were started, but MPI cannot be loaded ({str(error).splitlines()[0]}): "
            "python -m pip install '.[cluster]', or mpi4py for the MPI whose mpiexec or srun this is"
        ) from error
    world = MPI.COMM_WORLD
    if world.Get_size() != count:
        raise PipelineError(
            f"the launcher started {count} ranks, but MPI finds {world.Get_size()}: mpiexec and mpi4py belong to "
            "different MPIs; use the mpiexec beside this python (python -m pip install '.[cluster]' brings one)"
        )
    import atexit

    atexit.register(_end)
    return world


_orderly = False  # whether every rank has said that it leaves


def _end() -> None:
    from mpi4py import MPI

    if _orderly:
        MPI.Finalize()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    MPI.COMM_WORLD.Abort(1)


def _leave(leaving: Any, *, failed: bool) -> bool:
    """Tell the others that this rank leaves; False where it fails alone, or without the first rank."""
    global _orderly
    said = np.array([failed], dtype=np.int64)
    heard = np.zeros(leaving.Get_size(), dtype=np.int64)
    request = leaving.Iallgather(said, heard)
    end = time.monotonic() + PATIENCE
    while not request.Test():
        # A rank that has finished waits for the slowest; one that failed must not.
        if failed and time.monotonic() > end:
            return False
        time.sleep(0.002)
    _orderly = True
    return not failed or bool(heard[0])


def _share_machine(world: Any) -> None:
    """Give each rank of a machine its cores and its GPU, where the launcher has not.

    Cores are shared out by their number only: pinning is the launcher's business (``mpiexec -bind-to core``).
    """
    from mpi4py import MPI
    from threadpoolctl import threadpool_limits

    here = world.Split_type(MPI.COMM_TYPE_SHARED)
    # macOS binds no process to cores
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    mask = np.zeros(max(os.cpu_count() or 1, mine[-1] + 1), dtype=np.int64)
    mask[mine] = 1
    here.Allreduce(MPI.IN_PLACE, mask)
    bound = int(mask[mine].max()) < here.Get_size()
    cores = len(mine) if bound else max(1, len(mine) // here.Get_size())
    # Read when the kernels are first loaded, which has not happened yet.
    os.environ.setdefault("NUMBA_NUM_THREADS", str(cores))
    threadpool_limits(int(os.environ["NUMBA_NUM_THREADS"]), user_api="blas")
    card = card_of(os.environ.get("CUDA_VISIBLE_DEVICES"), here.Get_rank(), here.Get_size())
    if card is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = card
    here.Free()


def card_of(visible: str | None, local: int, ranks: int) -> str | None:
    """The GPU that a rank takes, one of those ``visible`` (CUDA_VISIBLE_DEVICES) on a machine with so many ranks.

    None where that is settled already: the rank is alone, the launcher has given it one, or all are hidden ("").
    """
    cards = [card for card in (visible or "").split(",") if card]
    if ranks == 1 or visible == "" or len(cards) == 1:
        return None
    return cards[local % len(cards)] if cards else str(local)


def _ranks(world: Any) -> Ranks:
    from mpi4py import MPI

    watched = _watch(world.Get_rank(), world.Get_size(), silence(os.environ))

    def add(a: np.ndarray) -> None:
        with watched():
            world.Allreduce(MPI.IN_PLACE, a)

    def unite(a: np.ndarray) -> None:
        with watched():
            world.Allreduce(MPI.IN_PLACE, a.view(np.uint8), MPI.BOR)

    def broadcast(a: np.ndarray) -> None:
        with watched():
            world.Bcast(a)

    def largest(number: int) -> int:
        value = np.array([number], dtype=np.int64)
        with watched():
            world.Allreduce(MPI.IN_PLACE, value, MPI.MAX)
        return int(value[0])

    def gather(a: np.ndarray) -> np.ndarray:
        rows = np.empty((world.Get_size(), *a.shape), dtype=a.dtype)
        with watched():
            world.Allgather(np.ascontiguousarray(a), rows)
        return rows

    def wait() -> None:
        meet(0.0)

    def meet(took: float) -> None:
        with watched(SLOWER * took):
            world.Barrier()

    return Ranks(
        rank=world.Get_rank(),
        size=world.Get_size(),
        add=add,
        unite=unite,
        broadcast=broadcast,
        largest=largest,
        gather=gather,
        wait=wait,
        meet=meet,
        watched=watched,
        reduce=partial(_sums, world, watched),
    )


def _sums(world: Any, watched: _Watched, gradients: Gradients) -> Iterator[tuple[str, np.ndarray]]:
    """Gradients' sums over all ranks, in the order in which they come, each as soon as it is there."""
    from mpi4py import MPI

    under_way: list[tuple[Any, np.ndarray, _Bucket]] = []
    for bucket in buckets(gradients, BUCKET):
        if bucket:
            flat = packed(bucket)
            under_way.append((world.Iallreduce(MPI.IN_PLACE, flat), flat, bucket))
        # MPI moves data while it is called: asking after each layer keeps the exchange going.
        while under_way and under_way[0][0].Test():
            yield from unpacked(*under_way.pop(0)[1:])
    for request, flat, bucket in under_way:
        with watched():
            request.Wait()
        yield from unpacked(flat, bucket)


def silence(environment: Mapping[str, str]) -> float:
    """Seconds that a rank waits for the others.

    Raises
    ------
    PipelineError
        ``ALEXNET_SILENCE`` is not a positive number.
    """
    text = environment.get("ALEXNET_SILENCE", str(SILENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise PipelineError(f"ALEXNET_SILENCE is {text!r}, which is not a positive number of seconds")
    return seconds


def _watch(rank: int, size: int, seconds: float) -> _Watched:
    """A context to wait in: a wait longer than ``seconds``, plus what more it is allowed, ends this process.

    The launcher then ends the job. MPI does not notice a network that breaks or a machine that stops: it waits for
    ever, in C, where no signal's handler runs. So a thread looks after it, and ends the process without asking MPI,
    which might wait again.
    """
    waits: list[tuple[float, float]] = []  # the one under way, if any: its allowance, and when that is used up

    def look() -> None:
        while True:
            time.sleep(min(1.0, seconds / 4))
            for allowed, end in waits[:]:
                if time.monotonic() > end:
                    # Not sys.stderr, which prints on the first rank only.
                    print(
                        f"rank {rank} of {size}, on {socket.gethostname()}, has heard nothing of the others for "
                        f"{allowed:g} s (ALEXNET_SILENCE) and ends the job: a machine or the network between them is "
                        "down, or a rank is stopped; go on with --resume",
                        file=sys.__stderr__,
                        flush=True,
                    )
                    os._exit(1)

    threading.Thread(target=look, name="watch", daemon=True).start()

    @contextlib.contextmanager
    def watched(more: float = 0.0) -> Iterator[None]:
        waits.append((seconds + more, time.monotonic() + seconds + more))
        try:
            yield
        finally:
            waits.clear()

    return watched


def buckets(gradients: Gradients, size: int) -> Iterator[_Bucket]:
    """Group gradients, in the order they come, into few messages.

    One of at least ``size`` bytes is a group of its own; smaller ones wait until together they have as many, or until
    the end. After each gradient that completes no group an empty list is handed out, so that the receiver can look
    after its messages.
    """
    waiting: _Bucket = []
    for name, given in gradients:
        gradient = np.asarray(given)  # a backend may compute one only now that it is wanted
        if gradient.nbytes >= size:
            yield [(name, gradient)]
            continue
        waiting.append((name, gradient))
        if sum(g.nbytes for _, g in waiting) >= size:
            yield waiting
            waiting = []
        else:
            yield []
    if waiting:
        yield waiting


def packed(bucket: _Bucket) -> np.ndarray:
    """The gradients of a bucket as one row; a single one is not copied where it lies in memory without gaps."""
    rows = [np.ascontiguousarray(gradient).reshape(-1) for _, gradient in bucket]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def unpacked(flat: np.ndarray, bucket: _Bucket) -> Iterator[tuple[str, np.ndarray]]:
    """The gradients of a bucket from its row."""
    first = 0
    for name, gradient in bucket:
        yield name, flat[first : first + gradient.size].reshape(gradient.shape)
        first += gradient.size
