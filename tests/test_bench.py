"""The benchmarks say in a sentence what they cannot work with."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_TORCH = (
    "import runpy, sys; sys.modules['torch'] = None; name = sys.argv.pop(1); "
    "runpy.run_module(name, run_name='__main__', alter_sys=True)"
)


def _refused(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2), done
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("name", ["cpu", "cpu_error", "data", "evidence_torch", "parity"])
def test_without_pytorch_the_command_that_brings_it_is_told(name: str) -> None:
    said = _refused("-c", WITHOUT_TORCH, f"bench.{name}")
    assert said == "error: torch is not installed: python -m pip install '.[bench]'\n"


def test_a_part_that_fails_says_why_and_the_whole_which(tmp_path: Path) -> None:
    said = _refused("-m", "bench.cpu_curves", "--run", str(tmp_path), "--steps", "1", "--only", "hand")
    first, second = said.splitlines()
    assert re.match(rf"error: {tmp_path}/preprocess/manifest\.json does not exist", first)
    assert re.match(r"error: ended with status 1, for the reason above: .* -m bench\.cpu_curves --side hand", second)


def test_a_part_that_is_killed_has_said_no_reason() -> None:
    killed = "import bench, subprocess; subprocess.run(['sh', '-c', 'kill -9 $$'], check=True)"
    assert _refused("-c", killed) == "error: ended by signal 9: sh -c 'kill -9 $$'\n"


def test_evidence_says_why_there_are_no_pictures(tmp_path: Path) -> None:
    said = _refused("-m", "bench.evidence", "--source", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    assert f"--source names {tmp_path / 'none'}, which is not a folder" in said


@pytest.mark.parametrize("line", ["cpu_layers --batch 0", "cpu_small --rounds 0", "scaling --rounds many"])
def test_a_number_of_things_is_at_least_one(line: str) -> None:
    assert "takes a whole number of at least 1" in _refused("-m", *f"bench.{line}".split())


@pytest.mark.parametrize("rate", ["0", "-3", "nan"])
def test_a_rate_is_above_zero(rate: str) -> None:
    assert "takes a number above 0" in _refused("-m", "bench.full_run", "--rate", rate)
