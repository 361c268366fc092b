"""Why a GPU cannot be used, in one sentence each; and how much memory a batch needs."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from net.alexnet import alexnet
from net.backend import BackendUnavailableError, choose, load
from net.gpu import cublas, memory, setup
from net.layers import fuse
from tests.gpu import standin, test_network

ROOT = Path(__file__).parents[2]


@pytest.fixture
def without_cupy(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """``without_cupy(error)``: ``import cupy`` raises it."""
    original = builtins.__import__

    def refuse(error: BaseException) -> None:
        def importing(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.split(".")[0] == "cupy":
                raise error
            return original(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", importing)

    return refuse


def test_importing_the_backend_needs_neither_gpu_nor_cupy() -> None:
    code = "import sys, net.gpu; assert 'cupy' not in sys.modules; print(len(net.gpu.__all__))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_cupy(without_cupy: Callable[[BaseException], None]) -> None:
    without_cupy(ModuleNotFoundError("No module named 'cupy'", name="cupy"))
    reason = setup.availability()
    assert reason == f"CuPy is not installed: {setup.INSTALL}"
    with pytest.raises(BackendUnavailableError, match="CuPy is not installed"):
        load("gpu")


def test_a_cupy_that_does_not_load(without_cupy: Callable[[BaseException], None]) -> None:
    without_cupy(ImportError("libcuda is odd.\nand more", name="cupy._core"))
    assert "cannot be loaded (libcuda is odd)" in str(setup.availability())


def test_a_home_where_cupy_cannot_make_its_folder(without_cupy: Callable[[BaseException], None]) -> None:
    """CuPy makes it when it is imported; a run on the CPU must not end by that."""
    without_cupy(PermissionError(13, "Permission denied", "/.cupy"))
    assert "cannot make its folder for compiled kernels ([Errno 13] Permission" in str(setup.availability())
    assert "CUPY_CACHE_DIR" in str(setup.availability())
    assert choose("auto")[0] == "cpu"


def test_no_driver(pretended: standin.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["cupy"].cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys.modules["cupy"].cuda.runtime, "driverGetVersion", lambda: 0)
    assert "no NVIDIA GPU" in str(setup.availability())
    assert "nvidia-smi" in str(setup.availability())
    monkeypatch.setattr(sys.modules["cupy"].cuda.runtime, "driverGetVersion", lambda: 12040)
    monkeypatch.setattr(sys.modules["cupy"].cuda.runtime, "runtimeGetVersion", lambda: 13000)
    assert "driver knows CUDA up to 12.4, but CuPy was made for CUDA 13" in str(setup.availability())


def test_a_driver_without_a_card_to_use(pretended: standin.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi shows a card all the same: what CUDA says of it, and the variable that hides it, must be told."""

    def fail() -> None:
        raise standin.CUDARuntimeError("cudaErrorSystemNotReady: system not yet initialized")

    monkeypatch.setattr(sys.modules["cupy"].cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys.modules["cupy"].cuda.runtime, "getDeviceCount", fail)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "(cudaErrorSystemNotReady: system not yet initialized)" in str(setup.availability())
    assert "CUDA_VISIBLE_DEVICES" not in str(setup.availability())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "no GPU among CUDA_VISIBLE_DEVICES='7' (cudaErrorSystem" in str(setup.availability())
    monkeypatch.setattr(sys.modules["cupy"].cuda.runtime, "getDeviceCount", lambda: 0)
    assert "no GPU among CUDA_VISIBLE_DEVICES='7': nvidia-smi -L" in str(setup.availability())


def test_a_folder_that_takes_no_kernels(pretended: standin.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is there, so importing CuPy goes well, and the first kernel cannot be put into it."""

    def fail(**_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/home/x/.cupy/kernel_cache/tmpa1b2")

    monkeypatch.setattr(sys.modules["cupy"], "RawModule", fail)
    assert "cannot keep compiled kernels ([Errno 13] Permission denied" in str(setup.availability())
    assert "CUPY_CACHE_DIR" in str(setup.availability())
    assert choose("auto")[0] == "cpu"


@pytest.mark.parametrize("short_of", ["cuBLAS", "memory"])
def test_a_card_that_others_have_filled(
    pretended: standin.Machine, monkeypatch: pytest.MonkeyPatch, short_of: str
) -> None:
    """The context fits, what cuBLAS needs does not: a sentence that names the programs' list, not a traceback."""
    standin.forget()
    pretended.others = pretended.memory - 2**30
    if short_of == "cuBLAS":
        monkeypatch.setattr(cublas.load_library(), "cublasCreate_v2", lambda handle: 1)
    else:
        standin._default_pool.free_all_blocks()
        pretended.limit = pretended.allocated
    with pytest.raises(BackendUnavailableError, match="libraries cannot start") as caught:
        load("gpu")
    assert "GiB free: nvidia-smi lists" in str(caught.value)
    assert "\n" not in str(caught.value)
    standin.forget()


def test_a_host_without_memory_to_pin(
    fp32: ModuleType, pretended: standin.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's error would be a traceback; the command line has a sentence for MemoryError."""

    def fail(*_: Any) -> None:
        raise standin.CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")

    monkeypatch.setattr(sys.modules["cupyx"], "empty_pinned", fail)
    with pytest.raises(MemoryError, match="no 24 bytes can be pinned"):
        fp32.host_empty((2, 3), np.float32)


def test_which_of_several_cards_is_said(fp32: ModuleType, pretended: standin.Machine) -> None:
    assert fp32.card() == "a pretended GPU, 80 GiB"
    pretended.cards = 8
    assert fp32.card() == "a pretended GPU, 80 GiB, the first of 8; CUDA_VISIBLE_DEVICES chooses another"
    assert fp32.describe().startswith(fp32.card())


@pytest.mark.parametrize("missing", ["NVRTC", "cuBLAS"])
def test_a_missing_library(pretended: standin.Machine, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def fail() -> None:
        raise RuntimeError(f'Failure finding "lib{missing.lower()}.so.12".\nSearched in ...')

    if missing == "NVRTC":
        monkeypatch.setattr(sys.modules["cupy"].cuda.nvrtc, "getVersion", fail)
    else:
        monkeypatch.setattr(cublas, "load_library", fail)
    reason = str(setup.availability())
    assert f"lib{missing.lower()}" in reason
    assert setup.INSTALL in reason
    assert "\n" not in reason


def test_missing_headers(pretended: standin.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("Failed to find CUDA headers.\nPlease install ...")

    monkeypatch.setattr(sys.modules["cupy"], "RawModule", fail)
    assert setup.availability() == f"CuPy cannot compile kernels (Failed to find CUDA headers): {setup.INSTALL}"


def test_a_card_that_the_compiler_has_left_behind(pretended: standin.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise standin.CompileException("nvrtc: error: invalid value for --gpu-architecture (-arch)\n", "", "", ())

    monkeypatch.setattr(sys.modules["cupy"], "RawModule", fail)
    complaint = "CuPy cannot compile kernels (nvrtc: error: invalid value for --gpu-architecture (-arch)"
    assert setup.availability() == f"{complaint}): {setup.INSTALL}"
    pretended.capability = "70"
    older = "; CUDA 13 has no code for cards below compute capability 7.5"
    assert setup.availability() == f"{complaint}{older}): {setup.INSTALL}"


def test_an_old_card(pretended: standin.Machine) -> None:
    pretended.capability = "61"
    assert "6.1" in str(setup.availability())
    pretended.capability = "75"
    assert setup.availability() is None
    with pytest.raises(BackendUnavailableError, match="no bf16 arithmetic"):
        load("gpu", "bf16")
    load("gpu", "fp32")


def test_an_unknown_precision(pretended: standin.Machine) -> None:
    with pytest.raises(BackendUnavailableError, match="fp16"):
        load("gpu", "fp16")


def test_the_backend_says_what_it_computes_with(backend: Callable[[str], ModuleType]) -> None:
    ops = backend("bf16")
    assert ops.availability() is None
    assert "bf16" in ops.describe()
    assert "float32 sums" in ops.describe()


@pytest.mark.parametrize("status", [1, 7, 14, 99])
def test_a_failing_product_is_an_error(
    fp32: ModuleType, pretended: standin.Machine, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(cublas.load_library(), "cublasGemmEx", lambda *_: status)
    x = fp32.asarray(np.ones((2, 2), np.float32))
    with pytest.raises(RuntimeError, match="cuBLAS failed"):
        fp32.linear_forward(x, x, x[0])


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("training", [True, False])
def test_the_estimate_is_near_what_is_taken(
    backend: Callable[[str], ModuleType], pretended: standin.Machine, precision: str, training: bool
) -> None:
    """Not below what a step takes, nor far above; the context and the workspace are left out of both."""
    ops = backend(precision)
    standin.forget()
    ops = backend(precision)
    layers, shape, images = test_network.small(alexnet(test_network.CLASSES)), (test_network.SIDE,) * 2 + (3,), 16
    before = pretended.allocated
    if training:
        step, *_ = test_network.start(ops, "paper")
        for number in range(2):
            step(ops.upload(test_network.batch(number, images)))
    else:
        parameters = {n: ops.asarray(np.zeros(s, np.float32)) for n, s in _shapes(layers, shape).items()}
        x = ops.asarray(np.zeros((images, *shape), np.float32))
        from net.layers import Run
        from net.network import forward

        forward(ops, fuse(layers, ops), parameters, x, Run(training=False))
    ops.synchronize()
    taken = pretended.allocated - before
    estimate = memory.bytes_needed(layers, shape, images, training=training) - memory.CONTEXT - cublas.WORKSPACE
    # The stand-in's pool reuses only blocks of the very size, so it takes more than CuPy's would.
    assert 0.4 * taken < estimate < 2.5 * taken


def _shapes(layers: tuple, shape: tuple[int, int, int]) -> dict:
    from net.network import parameter_shapes

    return parameter_shapes(layers, shape)


def test_what_does_not_fit_is_said_before_it_is_tried(fp32: ModuleType, pretended: standin.Machine) -> None:
    pretended.memory = 8 * 2**30
    standin.forget()
    load("gpu", "fp32")
    layers, shape = alexnet(1000), (227, 227, 3)
    fp32.check_memory(layers, shape, 128, training=True)
    largest = fp32.largest_batch(layers, shape, training=True)
    assert 128 < largest < 4096
    with pytest.raises(MemoryError) as caught:
        fp32.check_memory(layers, shape, 4096, training=True)
    assert f"--set train.batch_size={largest}" in str(caught.value)
    assert "8.0 GiB" in str(caught.value)
    fp32.check_memory(layers, shape, largest, training=True)
    with pytest.raises(MemoryError):
        fp32.check_memory(layers, shape, largest + 1, training=True)
    assert fp32.largest_batch(layers, shape, training=False) > largest
    with pytest.raises(MemoryError, match=r"--set eval.batch_size=\d+$"):
        fp32.check_memory(layers, shape, 1000, training=False, views=10)
    pretended.others = 4 * 2**30
    assert 0 < fp32.largest_batch(layers, shape, training=True) < largest
    with pytest.raises(MemoryError, match="of it not taken by other programs"):
        fp32.check_memory(layers, shape, largest, training=True)
    pretended.others = 0
    pretended.memory = 80 * 2**30
    standin.forget()
    load("gpu", "bf16")
    assert fp32.largest_batch(layers, shape, training=True) > 2000


def test_out_of_memory_in_a_step_is_one_plain_sentence(fp32: ModuleType, pretended: standin.Machine) -> None:
    step = fp32.replayable(lambda inputs: fp32.softmax(inputs["x"]))
    inputs = fp32.upload({"x": np.ones((300, 700), np.float32)})
    standin._default_pool.free_all_blocks()
    pretended.limit = pretended.allocated
    with pytest.raises(MemoryError, match="does not suffice for a batch of 300") as caught:
        step(inputs)
    assert "out of memory allocating 840,000 bytes" in str(caught.value)
    assert "smaller batch" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.linesep not in str(caught.value)


def test_a_graph_that_finds_no_memory_is_told_like_a_batch(
    fp32: ModuleType, pretended: standin.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's own error, from outside CuPy's pools; and the batch is the pictures' number, not that of the rates."""

    def fail(_: standin.Stream) -> None:
        original(_)
        raise standin.CUDARuntimeError(said)

    original, said = standin.Stream.end_capture, "cudaErrorMemoryAllocation: out of memory"
    monkeypatch.setattr(standin.Stream, "end_capture", fail)
    step = fp32.replayable(lambda inputs: fp32.softmax(inputs["x"]))
    batch = {"x": np.ones((3, 700), np.float32), "rates": np.ones(16, np.float32)}
    step(fp32.upload(batch))
    with pytest.raises(MemoryError, match="does not suffice for a batch of 3: cudaErrorMemoryAllocation"):
        step(fp32.upload(batch))
    said = "cudaErrorLaunchFailure: unspecified launch failure"
    with pytest.raises(standin.CUDARuntimeError, match="unspecified"):
        step(fp32.upload(batch))
