"""What is compiled ahead of the first training step is all it needs, and every process compiles something else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from net.cpu import ahead, jit, update
from tests.command_line import ROOT

# Prints the kernels, with the types they have been called with, after the parts named and after a training step.
_KERNELS = """
import json, sys
from numba.core.dispatcher import Dispatcher
import net.cpu
from bench.cpu_sides import sides
from net.cpu import ahead

def called():
    modules = [module for name, module in sys.modules.items() if name.startswith("net.cpu.")]
    functions = {f for module in modules for f in vars(module).values() if isinstance(f, Dispatcher)}
    kernels = [f for f in functions if "parallel" in f.targetoptions]
    return sorted(f"{k.__module__}.{k.__name__} {s}" for k in kernels for s in k.signatures)

net.cpu.warm_up()
for part in json.loads(sys.argv[1]):
    ahead.PARTS[part]()
said = [called()]
if sys.argv[2] == "step":
    inputs, functions = sides(net.cpu, 5)
    functions["train"](inputs)
    said.append(called())
print(json.dumps(said))
"""


def _kernels(parts: list[int], then: str = "") -> list[list[str]]:
    command = [sys.executable, "-c", _KERNELS, json.dumps(parts), then]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_training_step_needs_no_kernel_that_was_not_compiled_ahead() -> None:
    before, after = _kernels(list(range(len(ahead.PARTS))), "step")
    assert len(before) > 10
    assert set(after) <= set(before)


def test_no_two_processes_compile_the_same_kernel() -> None:
    each = [_kernels([part])[0] for part in range(len(ahead.PARTS))]
    assert all(each)
    # warming up calls the update's kernel, whoever compiled it
    owned = [name for part in each for name in part if not name.startswith("net.cpu.update.")]
    assert len(owned) == len(set(owned))


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
    done: list[int] = []
    monkeypatch.setattr(ahead.numba, "get_num_threads", lambda: 2)
    monkeypatch.setattr(ahead, "PARTS", [lambda n=n: done.append(n) for n in range(11)])  # the helper knows four
    assert not ahead._compile_parts()
    assert done == [0, 2, 4, 6, 8, 10]
    said = capsys.readouterr().err
    assert "status 1" in said
    assert "IndexError" in said


def test_compiling_ahead_is_no_update() -> None:
    before = update.count()
    for part in ahead.PARTS:
        part()
    assert update.count() == before, "what was derived from fixed weights would be computed again"
