"""A step recorded once as a CUDA graph and replayed afterwards.

A training step is about a hundred kernels; started one by one from Python they would take longer to start than to
run. A recorded step starts with one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from net.gpu import beside
from net.gpu.arrays import empty, mark_finished
from net.gpu.device import current
from net.layers import Array

Step = Callable[[dict[str, Array]], Array]

# How the messages of CUDA's runtime and of its driver begin.
_OUT_OF_MEMORY: Final = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY")


def replayable(function: Step) -> Step:
    """A function that does what ``function`` does, from its second call for a batch shape on by replaying a graph.

    ``function`` takes a dictionary of device arrays and returns one device array. It must do nothing but queue work on
    the device, on arrays that stay where they are (parameters, changed in place) and on its inputs; whatever changes
    from call to call must be in the inputs, and nothing it allocates may outlive the call but its result. The first
    call runs it (which compiles kernels and fills the memory pool), the second records and replays it. The result is
    a copy: it stays valid when the next step runs.

    Raises
    ------
    MemoryError
        The device's memory does not suffice; the message is one plain sentence.
    """
    recordings: dict[Any, _Recording | None] = {}

    def call(inputs: dict[str, Array]) -> Array:
        stream = current().stream
        shapes = tuple((name, a.shape, a.dtype.str) for name, a in inputs.items())
        with _plainly(inputs):
            if shapes not in recordings:
                recordings[shapes] = None
                with _own_pool(), beside.allowed():
                    result = function(inputs)
                return _copy(result)
            recording = recordings[shapes]
            if recording is None:
                recording = recordings[shapes] = _record(function, inputs)
        for name, a in inputs.items():
            _copy_into(recording.inputs[name], a)
        recording.graph.launch(stream)
        result = _copy(recording.output)
        mark_finished(result)
        return result

    return call


@dataclass(frozen=True)
class _Recording:
    """A graph, and the arrays it reads its inputs from and writes its result to."""

    graph: Any
    inputs: dict[str, Array]
    output: Array


def _record(function: Step, inputs: dict[str, Array]) -> _Recording:
    stream = current().stream
    fixed = {name: empty(a.shape, a.dtype) for name, a in inputs.items()}
    with _own_pool():
        stream.begin_capture()
        try:
            with beside.allowed():
                output = function(fixed)
        except BaseException:
            _abandon(stream)
            raise
        return _Recording(stream.end_capture(), fixed, output)


@contextmanager
def _plainly(inputs: dict[str, Array]) -> Iterator[None]:
    """Turn an out-of-memory error, CuPy's or CUDA's own, into one plain sentence about this batch."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # A graph takes memory too when it is made, and kernels do when they are loaded: not through CuPy's pools.
        if not isinstance(error, MemoryError) and not str(error).startswith(_OUT_OF_MEMORY):
            raise
        batch = max(inputs.values(), key=lambda a: a.nbytes).shape[0] if inputs else 0  # the pictures, not the rates
        device = current()
        free, total = device.cupy.cuda.runtime.memGetInfo()
        raise MemoryError(
            f"the GPU's memory does not suffice for a batch of {batch}: {error}; "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free; "
            "choose a smaller batch or end the other programs that nvidia-smi lists"
        ) from error


def _abandon(stream: Any) -> None:
    """Leave recording; what was recorded is invalid, and the stream says so."""
    with suppress(RuntimeError):
        stream.end_capture()


@cache
def _pool() -> Any:
    """Memory that only recorded functions get: no other array may be given an address a graph writes to.

    The graphs share it. They run one after the other on one stream, and a result is copied out before the next runs.
    """
    pool = current().cupy.cuda.MemoryPool(_for_good)
    pool.set_limit(size=0)  # under CUPY_GPU_MEMORY_LIMIT a pool gives its free blocks back too
    return pool


def _for_good(size: int) -> Any:
    """Memory from the driver for the pool of recordings.

    A pool that meets CuPy's error for "no memory" gives the driver all blocks that no array holds, but those are the
    very blocks that recorded graphs go on writing to. So the other pool is emptied here instead, and where that does
    not suffice the error is one that the pool passes on.
    """
    cupy = current().cupy
    try:
        return _allocated(size)
    except cupy.cuda.runtime.CUDARuntimeError:
        cupy.get_default_memory_pool().free_all_blocks()
    try:
        return _allocated(size)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise MemoryError(f"out of memory allocating {size:,} bytes") from error


def _allocated(size: int) -> Any:
    memory = current().cupy.cuda
    return memory.MemoryPointer(memory.Memory(size), 0)


def held() -> int:
    """Bytes that recordings have had from the driver."""
    return _pool().total_bytes()


def _own_pool() -> Any:
    return current().cupy.cuda.using_allocator(_pool().malloc)


def _copy(a: Array) -> Array:
    copy = empty(a.shape, a.dtype)
    _copy_into(copy, a)
    return copy


def _copy_into(to: Array, a: Array) -> None:
    if not a.flags.c_contiguous:
        raise ValueError("inputs and results of a recorded function must lie in memory without gaps")
    to.data.copy_from_device_async(a.data, a.nbytes, current().stream)
