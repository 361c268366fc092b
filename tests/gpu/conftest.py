"""The GPU backend for its tests: on the stand-in, or with ALEXNET_TEST_GPU=1 on a real GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import ModuleType

import pytest

from net.backend import load
from tests.gpu import standin
from tests.gpu.shim import build

REAL = os.environ.get("ALEXNET_TEST_GPU") == "1"

# A machine lent for its GPU may lack the product's other packages; everywhere else their absence is an error.
_STAGES_NEED = ("h5py", "joblib", "jinja2", "matplotlib", "numba", "PIL", "safetensors", "scipy", "tqdm")
# Nor should its minutes go to what needs no card: the shim, the compiler, the sanitizers of g++.
_WITHOUT_CARD = ("test_cubins.py", "test_sanitizers.py", "test_shim.py", "test_standin.py")
collect_ignore = list(_WITHOUT_CARD) if REAL else []
if REAL and not all(map(find_spec, _STAGES_NEED)):
    collect_ignore.append("test_pipeline.py")


@pytest.fixture(scope="package")
def backend() -> Iterator[Callable[[str], ModuleType]]:
    """``backend(precision)`` starts net.gpu."""
    if REAL:
        yield lambda precision: load("gpu", precision)
        return
    need_compiler()
    with standin.installed():
        yield lambda precision: load("gpu", precision)


@pytest.fixture
def fp32(backend: Callable[[str], ModuleType]) -> ModuleType:
    return backend("fp32")


@pytest.fixture
def pretended(backend: Callable[[str], ModuleType]) -> Iterator[standin.Machine]:
    """The stand-in's settings, put back afterwards; skipped on a real GPU."""
    if REAL:
        pytest.skip("looks into the stand-in")
    machine, settings = standin.machine, build.settings
    before = vars(machine).copy(), vars(settings).copy()
    yield machine
    vars(machine).update(
        {name: before[0][name] for name in ("memory", "capability", "cards", "schedule", "limit", "others")}
    )
    vars(settings).update({"order": before[1]["order"]})


@pytest.fixture(params=build.ORDERS)
def order(request: pytest.FixtureRequest) -> Iterator[str]:
    """Threads and blocks in this order between barriers."""
    if REAL and request.param != "forward":
        pytest.skip("a GPU has its own order")
    before, build.settings.order = build.settings.order, request.param
    yield request.param
    build.settings.order = before


def need_compiler() -> None:
    """Skip where the kernels cannot be run for want of g++; under CI that is a failure."""
    if build.COMPILER is None:
        if os.environ.get("CI"):
            pytest.fail("g++ is not installed, so the CUDA kernels cannot be run: apt-get install g++")
        pytest.skip("running the CUDA kernels on the CPU needs g++ (apt-get install g++)")
