"""Compiled kernels are found again only by the sources and the machine they were compiled from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from net.cpu import jit
from tests.command_line import ROOT


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "cpu"
    folder.mkdir()
    for path in Path(jit.__file__).parent.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def test_the_name_follows_every_source_and_every_version(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [jit.cache_name(sources)]
    assert jit.cache_name(sources) == names[0]
    for path in sorted(sources.glob("*.py")):
        path.write_text(path.read_text() + "# changed\n")
        names.append(jit.cache_name(sources))
    monkeypatch.setattr(numba, "__version__", "0.0.1")
    names.append(jit.cache_name(sources))
    monkeypatch.setattr(jit.binding, "get_host_cpu_name", lambda: "another")
    names.append(jit.cache_name(sources))
    monkeypatch.setattr(numba.config, "CPU_NAME", "a third")  # not this machine: the one to compile for
    names.append(jit.cache_name(sources))
    monkeypatch.setattr(numba.config, "CPU_FEATURES", "+avx2")
    names.append(jit.cache_name(sources))
    assert len(set(names)) == len(names)


def test_an_older_version_s_folder_goes_and_another_machine_s_stays(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    before = jit.cache_folder(sources)
    assert before is not None
    assert before.parent == sources / "__pycache__"
    other = before.parent / "kernels-000000000000-0000000000000000"
    other.mkdir()
    (sources / "simd.py").write_text("BLOCK = 5\n")
    after = jit.cache_folder(sources)
    assert after != before
    assert sorted(after.parent.iterdir()) == sorted([after, other])


def test_where_the_sources_cannot_be_written_the_user_s_folder_serves(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (sources / "__pycache__").write_text("a file in the way, since permissions do not stop root")
    folder = jit.cache_folder(sources)
    assert folder is not None
    assert folder.is_relative_to(tmp_path / "user")
    (tmp_path / "given").mkdir()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "given"))
    assert jit.cache_folder(sources).is_relative_to(tmp_path / "given")
    for place in ("user", "given"):
        shutil.rmtree(tmp_path / place)
        (tmp_path / place).write_text("in the way too")
    assert jit.cache_folder(sources) is None


_PACKAGE = {
    "net/__init__.py": "",
    "net/cpu/__init__.py": "",
    "net/cpu/part.py": "from net.cpu.jit import inner\n\n@inner\ndef part(x):\n    return x + 1\n",
    "net/cpu/whole.py": (
        "import numpy as np\n\nfrom net.cpu.jit import kernel, prange\nfrom net.cpu.part import part\n\n"
        "@kernel\ndef whole(x):\n    for i in prange(x.size):\n        x[i] = 10 * part(x[i])\n\n"
        "x = np.ones(1, np.int64)\nwhole(x)\nprint(x[0])\n"
    ),
}


def test_a_change_in_an_inlined_function_of_another_file_is_noticed(tmp_path: Path) -> None:
    for name, text in _PACKAGE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copy(ROOT / "net" / "cpu" / "jit.py", tmp_path / "net" / "cpu")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}

    def run() -> tuple[str, str]:
        command = [sys.executable, "-c", "import net.cpu.whole"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip(), done.stderr

    first, said = run()
    assert first == "20"
    assert "compiling" in said
    assert run() == ("20", "")  # from the cache
    part = tmp_path / "net" / "cpu" / "part.py"
    part.write_text(part.read_text().replace("x + 1", "x + 2"))
    assert run()[0] == "30"


_GRADIENT = """
import hashlib
import numpy as np
from net import cpu

random = np.random.default_rng(0)
dy, x = random.standard_normal((2, 4, 15, 15, 96), dtype=np.float32)
y, s = cpu.lrn_forward(x, size=5, k=2.0, alpha=1e-4, beta=0.75)
dx = cpu.lrn_backward(dy, x, s, size=5, alpha=1e-4, beta=0.75)
print(hashlib.sha256(y.tobytes() + dx.tobytes()).hexdigest())
"""


def test_a_process_that_compiles_computes_what_one_that_loads_does(tmp_path: Path) -> None:
    def computed() -> str:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        run = [sys.executable, "-c", _GRADIENT]
        return subprocess.run(run, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout

    assert computed() == computed()


def test_numba_starts_without_packages_that_no_kernel_uses() -> None:
    """Their imports would be 0.15 s of every start; the first import of Numba has to be ``net.cpu.jit``'s."""
    script = "import sys, net.cpu; print(sorted({'scipy', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
