"""What CuPy, CUDA and cuBLAS refuse, or do otherwise than one might think, the stand-in does too."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from net.gpu import arrays, cublas, kernels
from net.gpu.device import current
from tests.gpu import standin

pytestmark = pytest.mark.usefixtures("pretended")


def test_a_stream_chosen_by_one_thread_is_not_another_threads(fp32: ModuleType) -> None:
    """Nor is an allocator: a backend started beside the thread that trains would have it on the null stream."""
    seen: list[Any] = []

    def look() -> None:
        seen.extend([standin.current_stream(), standin._here.allocators])

    with standin.using_allocator(standin.MemoryPool().malloc):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert seen == [standin._null, [standin._default_pool.malloc]]
    assert standin.current_stream() is current().stream


def test_reading_an_array_with_gaps_leaves_the_stream(fp32: ModuleType) -> None:
    """CuPy copies it `with stream:`, and is on its default stream afterwards; `to_host` must not be."""
    stream = current().stream
    a = fp32.asarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    np.testing.assert_array_equal(a[:, 1:3].get(stream=stream), [[1, 2], [5, 6], [9, 10]])
    assert standin.current_stream() is standin._null
    stream.use()
    np.testing.assert_array_equal(fp32.to_host(a[:, 1:3]), [[1, 2], [5, 6], [9, 10]])
    assert standin.current_stream() is stream
    with pytest.raises(RuntimeError, match="non-contiguous"):
        a[:, 1:3].set(np.zeros((3, 2), np.float32))


def test_products_go_to_the_handles_stream(fp32: ModuleType, pretended: standin.Machine) -> None:
    """Whatever stream is the current one: on another they would run too early, and on both at once."""
    a = fp32.asarray(np.ones((2, 2), np.float32))
    out = fp32.empty((2, 2), np.float32)
    fp32.synchronize()
    pretended.schedule = "late"
    other = standin.Stream()
    with other:
        cublas.multiply(cublas.of(out), cublas.of(a), cublas.of(a))
    current().stream.use()
    assert not other._queue
    np.testing.assert_array_equal(fp32.to_host(out), 2)


def test_a_workspace_given_before_the_stream_is_forgotten(fp32: ModuleType) -> None:
    library, handle = standin.Cublas(), ctypes.c_void_p()
    cublas.declare(library)
    library.cublasCreate_v2(ctypes.byref(handle))
    one = ctypes.c_float(1.0)
    a = fp32.asarray(np.ones((2, 2), np.float32))
    operand = (a.data.ptr, 0, 2)

    def multiply() -> int:
        sizes = (handle, 0, 0, 2, 2, 2, ctypes.byref(one))
        return library.cublasGemmEx(*sizes, *operand, *operand, ctypes.byref(one), *operand, 68, -1)

    assert library.cublasSetWorkspace_v2(handle, cublas._workspace().data.ptr, cublas.WORKSPACE) == 0
    assert library.cublasSetStream_v2(handle, current().stream.ptr) == 0
    assert multiply() == 1
    assert library.cublasSetWorkspace_v2(handle, cublas._workspace().data.ptr, cublas.WORKSPACE) == 0
    assert multiply() == 0


@pytest.mark.parametrize(("capability", "most"), [("75", 64), ("80", 163), ("89", 99), ("90", 227), ("120", 99)])
def test_no_kernel_gets_more_shared_memory_than_its_card_has(
    backend: Callable[[str], ModuleType], pretended: standin.Machine, capability: str, most: int
) -> None:
    standin.forget()
    pretended.capability = capability
    backend("fp32")
    kernel = kernels.compiled("loss", "softmax", "float32")
    kernel.max_dynamic_shared_size_bytes = most * 1024
    with pytest.raises(RuntimeError, match="INVALID_VALUE"):
        kernel.max_dynamic_shared_size_bytes = most * 1024 + 1
    standin.forget()


def test_nothing_is_compiled_or_loaded_while_recording(fp32: ModuleType) -> None:
    """It may wait for the device. The first call of a step runs it, and the second records."""
    kernels.compiled.cache_clear()
    stream = current().stream
    stream.begin_capture()
    try:
        with pytest.raises(RuntimeError, match="relu_forward is first wanted while recording"):
            kernels.compiled("elementwise", "relu_forward", "float32")
    finally:
        stream.end_capture()


def test_events_and_streams_that_cuda_refuses(fp32: ModuleType) -> None:
    start, end = standin.Event(), standin.Event(disable_timing=True)
    with pytest.raises(RuntimeError, match="InvalidResourceHandle"):  # not recorded
        standin.get_elapsed_time(start, standin.Event())
    start.record()
    end.record()
    with pytest.raises(RuntimeError, match="InvalidResourceHandle"):
        standin.get_elapsed_time(start, end)
    with pytest.raises(RuntimeError, match="default"):
        standin._null.begin_capture()
    stream, inside = current().stream, standin.Event()
    stream.begin_capture()
    inside.record(stream)
    with pytest.raises(RuntimeError, match="IllegalState"):
        stream.begin_capture()
    with pytest.raises(RuntimeError, match="CapturedEvent"):
        inside.synchronize()
    stream.end_capture()


def test_pinned_memory_has_no_values_yet(fp32: ModuleType) -> None:
    assert np.isnan(arrays.host_empty((3,), np.float32)).all()
