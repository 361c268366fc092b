"""The order of imports: downwards only, heavy packages in their own rooms, no framework in the product."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("pipeline", "data", "net", "stages")
MAY_IMPORT = {
    "pipeline": {"pipeline"},
    "data": {"data", "pipeline"},
    "net": {"net"},
    "stages": {"stages", "data", "net", "pipeline"},
}
ONLY_IN = {
    "numba": ("net/cpu/", "data/kernels.py"),
    "cupy": "net/gpu/",
    "cupyx": "net/gpu/",
    "cupy_backends": "net/gpu/",
    "mpi4py": "pipeline/mpi.py",
    "distributed": "data/cluster.py",
}
NEVER = {"torch", "tensorflow", "jax", "keras", "autograd", "pickle", "cloudpickle", "dill"}


def imported(source: str) -> set[str]:
    """Top-level names a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a module lives"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


def complaints(path: str, source: str) -> list[str]:
    room = path.split("/")[0]
    found = []
    for name in sorted(imported(source)):
        if name in (*ROOMS, "tests", "bench", "run_pipeline") and name not in MAY_IMPORT[room]:
            found.append(f"{path} imports {name}, which lies above it")
        if name in NEVER:
            found.append(f"{path} imports {name}")
        if name in ONLY_IN and not path.startswith(ONLY_IN[name]):
            found.append(f"{path} imports {name}, which belongs in {ONLY_IN[name]}")
    return found


def modules() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for room in ROOMS for p in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", modules())
def test_imports_run_downwards(path):
    assert complaints(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("net/layers.py", "from data.loader import load"),
        ("data/loader.py", "def f():\n    import net.cpu"),
        ("pipeline/config.py", "import stages.train"),
        ("net/reference/lrn.py", "import numba"),
        ("data/images.py", "import numba"),
        ("stages/train.py", "import cupy"),
        ("stages/train.py", "from mpi4py import MPI"),
        ("net/cpu/jit.py", "import torch"),
    ],
)
def test_an_arrow_upwards_is_noticed(path, source):
    assert len(complaints(path, source)) == 1


def test_no_cycles_between_modules():
    paths = {path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path for path in modules()}
    graph = {}
    for name, path in paths.items():
        targets = set()
        # Imports inside functions too: they are there to come later, not to hide a cycle.
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # `from package import module` needs the module, not what the package itself defines.
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= inner & paths.keys() or {node.module}
        graph[name] = targets & paths.keys()

    def visit(name, way):
        assert name not in way, " -> ".join([*way, name])
        for target in graph.get(name, ()):
            visit(target, (*way, name))

    for name in graph:
        visit(name, ())


def test_a_start_does_not_wait_for_numba_before_it_draws():
    """The training stage begins to draw weights, which needs NumPy alone, and loads the backend meanwhile."""
    heavy = "('numba', 'scipy', 'PIL', 'matplotlib', 'jinja2', 'joblib', 'cupy')"
    script = f"import sys, run_pipeline, stages.train; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_installing_brings_no_top_level_package():
    # The path is given because an install leaves its egg-info in the checkout, which would be found first.
    installed = importlib.metadata.distributions(name="alexnet-by-hand", path=[sysconfig.get_paths()["purelib"]])
    distribution = next(iter(installed), None)
    if distribution is None:
        pytest.skip("the project runs from its checkout and is not installed here")
    tops = {file.parts[0] for file in distribution.files or []}
    assert {top for top in tops if not top.endswith(".dist-info")} == set()
