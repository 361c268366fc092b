"""What pyproject.toml promises: the extras there are, and that each brings what its part of the project imports."""

from __future__ import annotations

import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.command_line import ROOT
from tests.test_imports import ROOMS, imported

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Packages that bring more than what is called as they are: other modules, and packages of their own dependencies.
BROUGHT_BY = {
    "PIL": "pillow",
    "llvmlite": "numba",
    "markupsafe": "jinja2",
    "dask": "distributed",
    "cupyx": "cupy",
    "cupy_backends": "cupy",
    "cuda": "cupy",
    "packaging": "pytest",
}
OURS = {*ROOMS, "bench", "tests", "run_pipeline"}


def packages(*extras: str) -> set[str]:
    """The packages that an installation with these extras is asked to bring; CuPy's wheels have one name here."""
    wanted = [*PROJECT["dependencies"], *(p for extra in extras for p in PROJECT["optional-dependencies"][extra])]
    return {re.match(r"[A-Za-z0-9]+", package)[0].lower() for package in wanted}


def test_the_extras_are_those_that_users_rely_on() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {"gpu", "gpu13", "test", "bench", "cluster"} <= extras.keys()
    assert extras["gpu"][0].startswith("cupy-cuda12x")
    assert extras["gpu13"][0].startswith("cupy-cuda13x")


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (ROOMS, ("gpu", "cluster", "export", "fast", "tensorboard")),
        (("bench",), ("bench", "gpu", "cluster")),
        (("tests",), ("test", "bench", "gpu")),  # PyTorch and CuPy where they are there
    ],
)
def test_what_is_imported_is_brought(folders: tuple[str, ...], extras: tuple[str, ...]) -> None:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    names = set().union(*(imported(path.read_text()) for path in files)) - OURS - sys.stdlib_module_names
    names -= {"cv2"}  # bench.data compares with OpenCV too where that happens to be there
    assert {BROUGHT_BY.get(name, name).lower() for name in names} - packages(*extras) == set()


def test_constraints_pin_what_is_asked_for() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    versions = {name.lower(): version for name, version in pinned.items()}
    extras = {name: wanted for name, wanted in PROJECT["optional-dependencies"].items() if name != "gpu13"}
    for text in [*PROJECT["dependencies"], *(text for wanted in extras.values() for text in wanted)]:
        package = Requirement(text)
        if package.name != "torch":
            assert package.specifier.contains(versions[package.name.lower()]), text
