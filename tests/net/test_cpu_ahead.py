"""What is compiled ahead of the first training step is all it needs, and every process compiles something else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from net.cpu import ahead, jit, update
from tests.command_line import ROOT

# Prints the kernels, with the types they have been called with, of each part in a process of its own, and those that a
# training step adds to all parts.
_KERNELS = """
import json, os, sys
from numba.core.dispatcher import Dispatcher
import net.cpu
from net.cpu import ahead
from tests.net.test_cpu import ORIGINAL, SEED, Training

def kernels():
    modules = [module for name, module in sys.modules.items() if name.startswith("net.cpu.")]
    functions = {f for module in modules for f in vars(module).values() if isinstance(f, Dispatcher)}
    return [f for f in functions if "parallel" in f.targetoptions]

def called():
    return sorted(f"{k.__module__}.{k.__name__} {s}" for k in kernels() for s in k.signatures)

for part in ahead.PARTS:
    if os.fork() == 0:
        part()
        print(json.dumps(called()), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
for part in ahead.PARTS:
    part()
before = called()
for network in (SEED, ORIGINAL):
    for batch in (6, 1):
        training = Training(net.cpu, batch, network)
        training.step()
        training.predict(training.batch_of(batch))
print(json.dumps(sorted(set(called()) - set(before))))
print(json.dumps(sorted(f"{k.__module__}.{k.__name__}"[8:] for k in kernels() if not k.signatures)))
"""


def test_the_parts_are_all_that_training_needs_and_no_kernel_is_in_two() -> None:
    subprocess.run([sys.executable, "-c", "import net.cpu; net.cpu.warm_up()"], cwd=ROOT, check=True)
    done = subprocess.run([sys.executable, "-c", _KERNELS], cwd=ROOT, capture_output=True, text=True, check=True)
    *each, added, never = (json.loads(line) for line in done.stdout.splitlines())
    assert len(each) == len(ahead.PARTS)
    assert all(each)
    assert sum(map(len, each)) == len(set().union(*each))
    assert added == []
    assert never == ["im2col._col2im", "im2col._im2col"]  # all of AlexNet's convolutions have transforms


def test_parts_are_compiled_until_that_has_been_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def compile_parts() -> bool:
        asked.append(len(asked) > 0)
        return asked[-1]

    monkeypatch.setattr(ahead, "_compile_parts", compile_parts)
    monkeypatch.setattr(jit, "FOLDER", tmp_path)
    for _ in range(4):
        ahead.warm_up()
    assert asked == [False, True]
    monkeypatch.setattr(jit, "FOLDER", None)
    ahead.warm_up()
    assert asked == [False, True]


def test_a_helper_s_end_is_told_and_its_part_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ahead.numba, "get_num_threads", lambda: 2)
    monkeypatch.setattr(ahead, "PARTS", [pytest.fail] * 11)  # the helpers know four; this process compiles none
    assert not ahead._compile_parts()
    said = capsys.readouterr().err
    assert "status 1" in said
    assert "IndexError" in said


def test_compiling_ahead_is_no_update() -> None:
    before = update.count()
    for part in ahead.PARTS:
        part()
    assert update.count() == before, "what was derived from fixed weights would be computed again"


def test_a_helper_finds_packages_where_its_parent_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import pathlib; pathlib.Path(__file__).with_name('seen').touch()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with ahead._helper(range(0)) as helper:
        assert ahead._ended_well(*helper)
    assert (tmp_path / "seen").exists()


def test_a_helper_takes_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program may be started from anywhere, such as a project that has a package ``net`` of its own."""
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    with ahead._helper(range(0)) as helper:
        assert ahead._ended_well(*helper)
