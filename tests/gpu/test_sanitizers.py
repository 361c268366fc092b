"""The address and the thread sanitizer over the kernels, and that each sees what it should."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.conftest import REAL, need_compiler
from tests.gpu.shim import build

ROOT = Path(__file__).parents[2]


def run(sanitizer: str, job: str, *change: str) -> subprocess.CompletedProcess[str]:
    """``job`` of ``sanitized.py`` with the sanitizer's library loaded before Python's own."""
    if REAL:
        pytest.skip("for the CPU only")
    need_compiler()
    short = {"address": "asan", "thread": "tsan"}[sanitizer]
    library = subprocess.run(
        [str(build.COMPILER), f"-print-file-name=lib{short}.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(library).is_absolute():
        if os.environ.get("CI"):
            pytest.fail(f"g++ has no lib{short}: apt-get install libgcc-12-dev")
        pytest.skip(f"g++ has no lib{short}")
    environment = os.environ | {
        "SHIM_SANITIZER": sanitizer,
        "LD_PRELOAD": os.path.realpath(library),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:exitcode=66",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-m", "tests.gpu.sanitized", job, *change]
    if sanitizer == "thread" and (setarch := shutil.which("setarch")):
        command = [setarch, "-R", *command]  # the thread sanitizer wants addresses where it expects them
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_no_kernel_touches_memory_that_is_not_its_own() -> None:
    done = run("address", "everything")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "done"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("elementwise", "if (e < size) put(y[e], relu(to_float(x[e])))", "put(y[e], relu(to_float(x[e])))"),
        ("relu_lrn_pool", "for (int p = lane; p < pixels; p += lanes)", "for (int p = lane; p <= pixels; p += lanes)"),
    ],
    ids=["global memory", "shared memory"],
)
def test_the_address_sanitizer_sees_an_index_off_by_one(file: str, old: str, new: str) -> None:
    done = run("address", "everything", file, old, new)
    assert done.returncode == 66
    assert "heap-buffer-overflow" in done.stderr
    assert "kernel.cu" in done.stderr  # and says where


def test_no_two_threads_race() -> None:
    done = run("thread", "races")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "done"


def test_the_thread_sanitizer_sees_a_missing_barrier() -> None:
    done = run(
        "thread",
        "races",
        "loss",
        "shared[threadIdx.x / 32] = x;\\n    __syncthreads();",
        "shared[threadIdx.x / 32] = x;",
    )
    assert done.returncode == 66
    assert "data race" in done.stderr
