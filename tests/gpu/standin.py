"""A stand-in for the part of CuPy and cuBLAS that ``net.gpu`` uses, on the CPU.

It exists so that the real backend code runs where there is no GPU: kernels go through the shim, matrix products
through NumPy with the operands rounded as tensor cores round them. It is made to be unforgiving where a GPU would
only sometimes be:

- Memory comes from pools that never give it back and hand it out filled with NaN.
- Work is queued on streams. ``schedule`` says when it is done: at once, or as late as possible on all streams but one,
  so that a missing event or a buffer reused too early gives wrong values.
- While a stream records, nothing runs. A recorded graph runs the same kernels on the same addresses with the same
  numbers, so whatever should have been read from device memory and was not shows. Waiting for the device and copying
  from pageable host memory are refused while recording.
- Arrays know only what the backend and the network need; there is no arithmetic on bfloat16 bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests.gpu.shim import build

_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = (ctypes.c_size_t,)


@dataclass
class Machine:
    """The pretended card, and what happened on it."""

    memory: int = 80 * 2**30
    capability: str = "90"
    schedule: str = "at once"  # or "late": as late as possible; "copies first": copies at once, the rest late
    others: int = 0  # bytes that other programs have
    cards: int = 1  # of its kind in the computer
    allocated: int = 0  # bytes obtained from the system
    allocations: int = 0  # how often the system was asked
    limit: int | None = None  # bytes at which memory is out
    products: int = 0
    blocks: list[tuple[int, int]] = field(default_factory=list)  # address, size of everything obtained


machine = Machine()


class OutOfMemoryError(MemoryError):
    pass


class CUDARuntimeError(RuntimeError):
    pass


# --- streams -------------------------------------------------------------------------------------------------------

_numbers = itertools.count(1)
_streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
Work = Callable[[], None]


class Stream:
    def __init__(self, non_blocking: bool = False, priority: int = 0) -> None:
        self.ptr = next(_numbers) * 4096
        _streams[self.ptr] = self
        self._queue: deque[Work] = deque()
        self._recording: list[Work] | None = None
        self._began = False  # a recording, rather than joined one

    def use(self) -> Stream:
        _here.stream = self
        return self

    def __enter__(self) -> Stream:
        _here.streams.append(self)
        return self.use()

    def __exit__(self, *error: object) -> None:
        """As CuPy's: back to the `with` around this one, or the default stream, whatever use() had chosen."""
        _here.streams.pop()
        _here.streams[-1].use()

    def queue(self, work: Work) -> None:
        if self._recording is not None:
            self._recording.append(work)
            return
        self._queue.append(work)
        if machine.schedule == "at once" or (machine.schedule == "copies first" and self is not _here.stream):
            self.drain()

    def drain(self, until: object = None) -> None:
        while self._queue:
            work = self._queue.popleft()
            work()
            if until is not None and work is until:
                return

    def synchronize(self) -> None:
        if self._recording is not None:
            raise CUDARuntimeError(
                "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing"
            )
        self.drain()

    def wait_event(self, event: Event) -> None:
        mark, stream = event.mark, event.stream
        if stream is not None and stream is not self and stream._recording is not None:
            if self._recording is None:
                self._recording = []  # a branch of the graph begins
            elif self is _recording_stream():
                # And ends. In the graph its work comes as late as possible: here.
                self._recording += stream._recording
                stream._recording = None
            return
        self.queue(lambda: stream.drain(mark) if stream is not None and mark in stream._queue else None)

    def record(self, event: Event) -> Event:
        event.record(self)
        return event

    def begin_capture(self, mode: int | None = None) -> None:
        if self is _null:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self._recording is not None:
            raise CUDARuntimeError("cudaErrorIllegalState: the operation cannot be performed in the present state")
        self._recording, self._began = [], True

    def end_capture(self) -> Graph:
        assert self._recording is not None
        recorded, self._recording = self._recording, None
        branches = [s for s in _streams.values() if s._recording is not None]
        for branch in branches:
            branch._recording = None
        if branches:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnjoined: a branch of the graph was not joined")
        return Graph(recorded)

    def is_capturing(self) -> bool:
        return self._recording is not None


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.stream: Stream | None = None
        self.mark: Work = lambda: None
        self.timed, self.recorded_in_graph = not disable_timing, False

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or _here.stream
        self.mark = lambda: None
        self.recorded_in_graph = self.stream.is_capturing()
        self.stream.queue(self.mark)

    def synchronize(self) -> None:
        if self.recorded_in_graph:
            raise CUDARuntimeError("cudaErrorCapturedEvent: operation not permitted on an event last recorded in one")
        if self.stream is not None and self.mark in self.stream._queue:
            self.stream.drain(self.mark)


class Graph:
    def __init__(self, work: list[Work]) -> None:
        self.work = work

    def launch(self, stream: Stream | None = None) -> None:
        for work in self.work:
            (stream or _here.stream).queue(work)


def get_elapsed_time(start: Event, end: Event) -> float:
    """No time passes here; CUDA's refusals are kept."""
    if any(event.stream is None or not event.timed for event in (start, end)):
        raise CUDARuntimeError("cudaErrorInvalidResourceHandle: invalid resource handle")
    return 0.0


def _recording_stream() -> Stream | None:
    return next((s for s in _streams.values() if s._began and s._recording is not None), None)


_null = Stream()


class _Here(threading.local):
    """What CuPy keeps for each thread: another thread than the one that started the backend is on the null stream."""

    def __init__(self) -> None:
        self.stream = _null
        self.streams = [_null]
        self.allocators: list[Callable[[int], MemoryPointer]] = [_default_pool.malloc]


def current_stream() -> Stream:
    """The stream that this thread queues on."""
    return _here.stream


# --- memory --------------------------------------------------------------------------------------------------------


class Memory:
    """Memory from the system, as cupy.cuda.Memory; its pool gives it back."""

    def __init__(self, size: int) -> None:
        if machine.limit is not None and machine.allocated + size > machine.limit:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        # 256-byte aligned like cudaMalloc's, and ending exactly at the size asked for.
        address = ctypes.c_void_p()
        assert _libc.posix_memalign(ctypes.byref(address), ctypes.c_size_t(256), ctypes.c_size_t(size or 1)) == 0
        assert address.value is not None
        self.address, self.size = address.value, size
        machine.allocated += size
        machine.allocations += 1
        machine.blocks.append((self.address, size))

    def give_back(self) -> None:
        """The system keeps it, so that no test depends on what would be put there: it only becomes illegal."""
        machine.allocated -= self.size
        machine.blocks.remove((self.address, self.size))


class Block:
    """Memory in use; goes back to its pool when nobody holds it."""

    def __init__(self, pool: MemoryPool, memory: Memory) -> None:
        self.pool, self.memory, self.address = pool, memory, memory.address

    def __del__(self) -> None:
        self.pool.free.setdefault(self.memory.size, []).append(self.memory)


class MemoryPool:
    """As CuPy's: on CUDA's own error for "no memory" it frees all blocks not in use, and tries again."""

    def __init__(self, allocator: Callable[[int], MemoryPointer] | None = None) -> None:
        self.free: dict[int, list[Memory]] = {}
        self._allocator = allocator or (lambda size: MemoryPointer(Memory(size), 0))
        self._obtained: weakref.WeakSet[Memory] = weakref.WeakSet()

    def malloc(self, size: int) -> MemoryPointer:
        free = self.free.setdefault(size, [])
        memory = free.pop() if free else self._obtain(size)
        self._obtained.add(memory)
        pointer = MemoryPointer(Block(self, memory), 0)
        address = memory.address
        _here.stream.queue(lambda: ctypes.memset(address, 0xFF, size) and None)
        return pointer

    def _obtain(self, size: int) -> Memory:
        try:
            return self._allocator(size).mem
        except CUDARuntimeError:
            self.free_all_blocks()
        try:
            return self._allocator(size).mem
        except CUDARuntimeError as error:
            raise OutOfMemoryError(f"Out of memory allocating {size:,} bytes (allocated so far: ...).") from error

    def free_all_blocks(self) -> None:
        for memory in (memory for blocks in self.free.values() for memory in blocks):
            self._obtained.discard(memory)
            memory.give_back()
        self.free.clear()

    def total_bytes(self) -> int:
        return sum(memory.size for memory in self._obtained)

    def set_limit(self, size: int) -> None:
        assert size == 0


class MemoryPointer:
    def __init__(self, mem: Block | Memory, offset: int) -> None:
        self.mem, self.offset = mem, offset

    @property
    def ptr(self) -> int:
        return self.mem.address + self.offset

    def copy_from_device_async(self, src: MemoryPointer, size: int, stream: Stream | None = None) -> None:
        to, origin = self.ptr, src.ptr
        (stream or _here.stream).queue(lambda: ctypes.memmove(to, origin, size) and None)


_default_pool = MemoryPool()
_here = _Here()


@contextlib.contextmanager
def using_allocator(allocator: Callable[[int], MemoryPointer]) -> Iterator[None]:
    _here.allocators.append(allocator)
    try:
        yield
    finally:
        _here.allocators.pop()


def numpy_at(address: int, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> np.ndarray:
    """Device memory as NumPy sees it; refuses what lies outside everything ever allocated."""
    dtype = np.dtype(dtype)
    if 0 in shape:
        return np.empty(shape, dtype)
    steps = strides or tuple(int(np.prod(shape[i + 1 :])) * dtype.itemsize for i in range(len(shape)))
    extent = sum((n - 1) * s for n, s in zip(shape, steps, strict=True)) + dtype.itemsize
    if not any(start <= address and address + extent <= start + size for start, size in machine.blocks):
        raise build.KernelError(f"{extent} bytes at {address:#x} do not lie inside one allocation")
    memory = np.frombuffer((ctypes.c_char * extent).from_address(address), np.uint8)
    return np.lib.stride_tricks.as_strided(memory[: dtype.itemsize].view(dtype), shape, steps)


# --- arrays --------------------------------------------------------------------------------------------------------


class ndarray:
    """The little of cupy.ndarray that the backend and the network use."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, shape: Any, dtype: Any, memptr: MemoryPointer, strides: tuple[int, ...] | None = None) -> None:
        self.shape: tuple[int, ...] = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        self.dtype, self.data = np.dtype(dtype), memptr
        item = self.dtype.itemsize
        plain = tuple(int(np.prod(self.shape[i + 1 :])) * item for i in range(len(self.shape)))
        self.strides = strides or plain
        contiguous = all(n == 1 or s == p for n, s, p in zip(self.shape, self.strides, plain, strict=True))
        self.flags = SimpleNamespace(c_contiguous=contiguous or 0 in self.shape)

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: int(np.prod(self.shape)))
    nbytes = property(lambda self: self.size * self.dtype.itemsize)

    @property
    def _numpy(self) -> np.ndarray:
        return numpy_at(self.data.ptr, self.dtype, self.shape, self.strides)

    def get(self, stream: Stream | None = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        stream = stream or _here.stream
        host = np.empty(self.shape, self.dtype) if out is None else out
        dense = self
        if not self.flags.c_contiguous:
            with stream:  # CuPy's way, and its trap: see Stream.__exit__
                dense = empty(self.shape, self.dtype)
                dense[...] = self
        stream.queue(lambda: host.__setitem__(..., dense._numpy))
        if blocking:
            stream.synchronize()
        return host

    def set(self, arr: np.ndarray, stream: Stream | None = None) -> None:
        stream = stream or _here.stream
        assert isinstance(arr, np.ndarray)
        assert arr.shape == self.shape
        assert arr.dtype == self.dtype
        if not self.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        if stream.is_capturing():
            raise CUDARuntimeError("a copy from host memory would be recorded with its values")
        stream.queue(lambda: self._numpy.__setitem__(..., arr))  # read when the copy runs, as from pinned memory

    def reshape(self, *shape: Any) -> ndarray:
        wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        assert self.flags.c_contiguous
        return ndarray(np.empty(self.shape, np.bool_).reshape(wanted).shape, self.dtype, self.data)

    def __getitem__(self, index: Any) -> ndarray:
        # The same view of a host array tells offset and strides.
        parts = index if isinstance(index, tuple) else (index,)
        assert all(isinstance(p, slice | int) or p is None or p is Ellipsis for p in parts)
        base = np.lib.stride_tricks.as_strided(np.empty(1, self.dtype), self.shape, self.strides)
        view = base[(*parts, ...)] if Ellipsis not in parts else base[parts]
        offset = view.__array_interface__["data"][0] - base.__array_interface__["data"][0] if view.size else 0
        return ndarray(view.shape, self.dtype, MemoryPointer(self.data.mem, self.data.offset + offset), view.strides)

    def __setitem__(self, index: Any, value: ndarray) -> None:
        assert index is Ellipsis
        assert isinstance(value, ndarray)
        assert value.dtype == self.dtype
        _here.stream.queue(lambda: self._numpy.__setitem__(..., value._numpy))

    def _arithmetic(self, make: Callable[[np.ndarray], np.ndarray]) -> ndarray:
        if self.dtype != np.float32:
            raise TypeError(f"arithmetic on {self.dtype} bits")
        result = empty(make(np.zeros(self.shape, np.float32)).shape, np.float32)
        _here.stream.queue(lambda: result._numpy.__setitem__(..., make(self._numpy)))
        return result

    def __mul__(self, factor: float | ndarray) -> ndarray:
        if isinstance(factor, ndarray):  # one number on the device
            assert factor.shape == (1,)
            assert factor.dtype == np.float32
            return self._arithmetic(lambda x: x * factor._numpy)
        assert isinstance(factor, float)
        return self._arithmetic(lambda x: x * np.float32(factor))

    def mean(self, axis: int) -> ndarray:
        return self._arithmetic(lambda x: x.mean(axis=axis))


def empty(shape: Any, dtype: Any) -> ndarray:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    size = int(np.prod(sizes)) * np.dtype(dtype).itemsize
    return ndarray(sizes, dtype, _here.allocators[-1](size))


# --- kernels -------------------------------------------------------------------------------------------------------


class RawModule:
    def __init__(self, *, code: str, options: tuple[str, ...] = ()) -> None:
        assert isinstance(options, tuple), "CuPy takes no list"
        self._module = build.Module(code, [o for o in options if o.startswith("-D")])

    def get_function(self, name: str) -> RawKernel:
        if (
            _recording_stream() is not None
        ):  # loading may wait for the device; the call before the recording has done it
            raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {name} is first wanted while recording")
        return RawKernel(self._module.get_function(name))


class RawKernel:
    def __init__(self, kernel: build.Kernel) -> None:
        self._kernel = kernel

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._kernel.max_dynamic_shared_size_bytes

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        if size > card().shared_block:
            raise CUDARuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self._kernel.max_dynamic_shared_size_bytes = size

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
        assert isinstance(grid, tuple), "CuPy takes no list"
        assert isinstance(block, tuple), "CuPy takes no list"
        pointers = [a.data.ptr for a in args if isinstance(a, ndarray) and a.size]
        stream = _here.stream

        def queue(run: Work) -> None:
            def checked() -> None:
                _require_live(self._kernel.name, pointers)
                run()

            stream.queue(checked)

        self._kernel(grid, block, args, shared_mem=shared_mem, queue=queue)


def _require_live(name: str, pointers: list[int]) -> None:
    """A recorded kernel keeps its addresses: their memory must not have been given back since."""
    for pointer in pointers:
        if not any(start <= pointer < start + size for start, size in machine.blocks):
            raise build.KernelError(f"{name}: {pointer:#x} lies outside all memory")


# --- cuBLAS --------------------------------------------------------------------------------------------------------


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 values with the 8 significant bits bfloat16 has; ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 values with the 11 significant bits TF32 has; ties away from zero, as tensor cores round."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


class Cublas:
    """The functions of libcublas that ``net.gpu.cublas`` calls, column-major like the library's."""

    def __init__(self) -> None:
        self._stream: Stream | None = None
        self._workspace: tuple[int, int] | None = None
        # Plain functions, which take the argtypes that net.gpu.cublas declares.
        self.cublasCreate_v2 = lambda handle: self._create(handle)
        self.cublasSetMathMode = lambda handle, mode: 0 if mode == 16 else 7
        self.cublasSetStream_v2 = lambda handle, stream: self._set_stream(stream)
        self.cublasSetWorkspace_v2 = lambda handle, address, size: self._set_workspace(address, size)
        self.cublasGetVersion_v2 = lambda handle, version: 0
        self.cublasGemmEx = lambda *a: self._gemm(*a[:7], *_triple(a[7:10]), *_triple(a[10:13]), *_last(a[13:]))
        self.cublasGemmStridedBatchedEx = lambda *a: self._gemm(*a)

    def _create(self, handle: Any) -> int:
        handle._obj.value = 0xB1A5
        return 0

    def _set_stream(self, stream: int) -> int:
        """As the library's: it forgets the workspace, and one of its own is no other stream's and is not for graphs."""
        self._stream, self._workspace = _streams[stream], None
        return 0

    def _set_workspace(self, address: int, size: int) -> int:
        if address % 256:
            return 7
        self._workspace = address, size
        return 0

    def _gemm(self, handle: Any, transa: int, transb: int, m: int, n: int, k: int, alpha: Any, *rest: Any) -> int:
        a, a_type, lda, a_step, b, b_type, ldb, b_step, beta, c, c_type, ldc, c_step, batch, compute, _ = rest
        if handle.value != 0xB1A5 or lda < (k if transa else m) or ldb < (n if transb else k) or ldc < m:
            return 7
        if a_type != b_type or (a_type, c_type) not in ((0, 0), (14, 14), (14, 0)) or compute not in (68, 77):
            return 15
        if a_type == 14 and compute != 68:
            return 15
        if self._stream is None or self._workspace is None:
            return 1
        one, add = alpha._obj.value, beta._obj.value
        start, size = self._workspace

        def run() -> None:
            machine.products += 1
            numpy_at(start, np.uint8, (size,))  # still its own
            for i in range(batch):
                left = _column_major(a, a_type, (k, m) if transa else (m, k), lda, i * a_step)
                right = _column_major(b, b_type, (n, k) if transb else (k, n), ldb, i * b_step)
                left, right = _value(left, compute), _value(right, compute)
                out = _column_major(c, c_type, (m, n), ldc, i * c_step)
                with np.errstate(invalid="ignore", over="ignore"):
                    result = one * ((left.T if transa else left) @ (right.T if transb else right))
                    if add:
                        result += add * _value(out, 68)
                if c_type == 14:
                    out[...] = (round_to_bf16(result).view(np.uint32) >> 16).astype(np.uint16)
                else:
                    out[...] = result

        self._stream.queue(run)  # the handle's, whatever stream is the current one
        return 0


def _triple(operand: tuple[int, int, int]) -> tuple[int, int, int, int]:
    return (*operand, 0)


def _last(rest: tuple[Any, ...]) -> tuple[Any, ...]:
    beta, c, c_type, ldc, compute, algorithm = rest
    return beta, c, c_type, ldc, 0, 1, compute, algorithm


def _column_major(address: int, kind: int, shape: tuple[int, int], lead: int, first: int) -> np.ndarray:
    dtype = np.dtype(np.uint16 if kind == 14 else np.float32)
    strides = (dtype.itemsize, lead * dtype.itemsize)
    return numpy_at(address + first * dtype.itemsize, dtype, shape, strides)


def _value(a: np.ndarray, compute: int) -> np.ndarray:
    if a.dtype == np.uint16:
        return (a.astype(np.uint32) << 16).view(np.float32)
    return round_to_tf32(a) if compute == 77 else a


# --- NCCL ----------------------------------------------------------------------------------------------------------


class NcclCommunicator:
    """Of several ranks the only one there is; the others are taken to have the same values."""

    def __init__(self, ndev: int, commId: tuple[int, ...], rank: int) -> None:
        assert commId == NCCL_ADDRESS
        assert 0 <= rank < ndev
        self._ranks = ndev

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        assert (datatype, op) == (7, 0), "float32 sums"

        def work() -> None:
            received, sent = (numpy_at(address, np.float32, (count,)) for address in (recvbuf, sendbuf))
            received[...] = sent * np.float32(self._ranks)

        _streams[stream].queue(work)


NCCL_ADDRESS = tuple(range(-64, 64))


# --- the modules ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """What cards of a compute capability have, by the table of NVIDIA's programming guide; bytes."""

    shared_processor: int  # shared memory of a multiprocessor
    shared_block: int  # what a block may ask for


_LARGE, _SMALL = Card(228 * 1024, 227 * 1024), Card(100 * 1024, 99 * 1024)
CARDS = {
    "70": Card(96 * 1024, 96 * 1024),
    "75": Card(64 * 1024, 64 * 1024),
    "80": Card(164 * 1024, 163 * 1024),
    "86": _SMALL,
    "89": _SMALL,
    "90": _LARGE,
    "100": _LARGE,
    "120": _SMALL,
}


def card() -> Card:
    """The pretended one's; an unknown one is taken for the smallest."""
    return CARDS.get(machine.capability, CARDS["75"])


class Device:
    id = 0

    @property
    def compute_capability(self) -> str:
        return machine.capability

    def use(self) -> None:
        pass


def properties(number: int) -> dict[str, Any]:
    assert number == 0
    return {
        "name": b"a pretended GPU",
        "multiProcessorCount": 4,
        "sharedMemPerMultiprocessor": card().shared_processor,
        "totalGlobalMem": machine.memory,
    }


def empty_pinned(shape: Any, dtype: Any = float) -> np.ndarray:
    """Like CuPy's, with whatever values the memory had."""
    buffer = np.empty(shape, dtype)
    buffer.view(np.uint8).fill(0xFF)
    return buffer


@contextlib.contextmanager
def installed() -> Iterator[ModuleType]:
    """The backend with the stand-in in CuPy's and cuBLAS's place; afterwards everything is as before."""
    import net.gpu
    from net.gpu import cublas

    names = ("cupy", "cupyx", "cupy.cuda")
    before, load_library = {name: sys.modules.get(name) for name in names}, cublas.load_library
    forget()
    library = Cublas()
    cublas.declare(library)
    cublas.load_library = lambda: library  # type: ignore[assignment]
    sys.modules.update(_modules())
    try:
        yield net.gpu
    finally:
        forget()
        cublas.load_library = load_library
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def forget() -> None:
    """Drop all that the backend set up once per process."""
    from net.gpu import arrays, beside, cublas, device, graph, kernels, nccl

    device._device = None
    caches = (kernels.compiled, kernels._module, kernels._prepared, kernels.signatures, kernels.source)
    for cached in (
        *caches,
        cublas._handle,
        cublas._workspace,
        arrays._copying,
        beside._stream,
        graph._pool,
        nccl._stream,
    ):
        if hasattr(cached, "cache_clear"):  # a test may have put a plain function in its place
            cached.cache_clear()
    for store in (arrays._slots, arrays._queued, arrays._results, nccl._communicators):
        store.clear()


class CompileException(Exception):
    """What NVRTC's complaints become: no RuntimeError, and its text is not among its arguments."""

    def __init__(self, message: str, source: str, name: str, options: tuple[str, ...]) -> None:
        super().__init__()
        self._message = message

    def __str__(self) -> str:
        return self._message


def _modules() -> dict[str, ModuleType]:
    cupy, cupyx, cuda = ModuleType("cupy"), ModuleType("cupyx"), ModuleType("cupy.cuda")
    vars(cupy).update(ndarray=ndarray, empty=empty, RawModule=RawModule, cuda=cuda)
    vars(cupy).update(get_default_memory_pool=lambda: _default_pool)
    vars(cupyx).update(empty_pinned=empty_pinned)
    vars(cuda).update(
        is_available=lambda: True,
        nvrtc=SimpleNamespace(getVersion=lambda: (12, 9)),
        compiler=SimpleNamespace(CompileException=CompileException),
        runtime=SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 12090,
            getDeviceCount=lambda: machine.cards,
            getDeviceProperties=properties,
            memGetInfo=lambda: (machine.memory - machine.allocated - machine.others, machine.memory),
        ),
        Device=Device,
        Stream=Stream,
        Event=Event,
        Memory=Memory,
        MemoryPointer=MemoryPointer,
        MemoryPool=MemoryPool,
        using_allocator=using_allocator,
        nccl=SimpleNamespace(
            NcclCommunicator=NcclCommunicator, get_unique_id=lambda: NCCL_ADDRESS, NCCL_FLOAT32=7, NCCL_SUM=0
        ),
        get_elapsed_time=get_elapsed_time,
    )
    return {"cupy": cupy, "cupyx": cupyx, "cupy.cuda": cuda}
