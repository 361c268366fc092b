"""Every kernel compiles for every card, without spills."""

from __future__ import annotations

import os

import pytest

from net.gpu import kernels
from tests.gpu import cubins

NVRTC = cubins.library_path()


@pytest.fixture(autouse=True)
def nvrtc() -> None:
    if NVRTC is None:
        if os.environ.get("CI"):
            pytest.fail("NVRTC is not installed: python -m pip install '.[test]'")
        pytest.skip("compiling for the GPU needs NVRTC (python -m pip install nvidia-cuda-nvrtc-cu12)")


@pytest.mark.parametrize("architecture", cubins.ARCHITECTURES + cubins.OTHERS)
def test_every_kernel_compiles_without_spills(architecture: str) -> None:
    if not cubins.supported(architecture):
        pytest.skip(f"this NVRTC no longer compiles for {architecture}; version 12.9 does")
    found: set[str] = set()
    for file in kernels.sources():
        for kind in cubins.TYPES:
            if not cubins.used(file, kind, architecture):
                continue
            code, usages = cubins.compiled(file, kind, architecture)
            assert code.startswith(b"\x7fELF")
            for name, usage in usages.items():
                # Its 128 sums and their operands leave two registers too few, once a block, on cards before Hopper.
                crowded = name == "weight_gradient_128"
                assert usage.spills <= (16 if crowded else 0), f"{name}, {kind}, {architecture}: {usage}"
                assert usage.stack <= (8 if crowded else 0), f"{name}, {kind}, {architecture}: {usage}"
                bound = 512 if name.endswith("_1") and name.startswith("block") else kernels.THREADS
                bound = 256 if name.startswith(("convolve", "weight_gradient")) else bound  # two blocks of 128
                assert usage.most_threads >= bound, f"{name} cannot be launched with {bound} threads: {usage}"
                found.add(name)
    everything = {name for name, (file, _) in kernels.signatures().items()}
    implicit = {name for name, (file, _) in kernels.signatures().items() if file == "implicit"}
    wanted = dict.fromkeys((*cubins.WITHOUT_BFLOAT16, "sm_90"), everything - implicit) | {"sm_90a": implicit}
    assert found == wanted.get(architecture, everything)


def test_spills_are_seen() -> None:
    """The measure works: a kernel that needs more registers than it may have spills."""
    source = """
extern "C" __global__ void __launch_bounds__(1024, 2) crowded(float* x, int rounds) {
    float a[64];
    _Pragma("unroll") for (int i = 0; i < 64; i++) a[i] = x[threadIdx.x * 64 + i];
    for (int r = 0; r < rounds; r++)
        _Pragma("unroll") for (int i = 0; i < 64; i++) a[i] = a[i] * a[(i * 7 + 3) % 64] + x[r];
    _Pragma("unroll") for (int i = 0; i < 64; i++) x[threadIdx.x * 64 + i] = a[i];
}
"""
    _, usages = cubins.compile_cubin(source, "sm_90")
    assert usages["crowded"].spills > 0


def test_bfloat16_is_rounded_by_the_cards_own_instruction() -> None:
    """The shim cannot run the inline assembly; that it is compiled, and only where the card has it, is seen here."""
    for architecture, expected in (("sm_70", False), ("sm_75", False), ("sm_80", True), ("sm_90", True)):
        if not cubins.supported(architecture):
            continue
        code, _ = cubins.compile_cubin(kernels.source("elementwise"), architecture, ("-DBF16",))
        plain, _ = cubins.compile_cubin(
            kernels.source("elementwise").replace("__CUDA_ARCH__ >= 800", "0"), architecture, ("-DBF16",)
        )
        assert (code != plain) == expected
