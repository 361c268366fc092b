"""docs/evidence.md names what bench.evidence runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bench import evidence, evidence_plan
from pipeline.command_line import parse

TEXT = (Path(__file__).parent.parent / "docs" / "evidence.md").read_text(encoding="utf-8")


def test_command_is_taken_and_names_the_runs_of_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"^python -m bench\.evidence ((?:.*\\\n)*.*)$", TEXT, flags=re.MULTILINE)
    assert evidence.main([*shlex.split(command.replace("\\\n", " ")), "--out", str(tmp_path), "--list"]) == 0
    names = set(re.findall(r"^left  seed \d  (.+)$", capsys.readouterr().out, flags=re.MULTILINE))
    rows = re.findall(r"^\| ([\w ]+) \| .+ \|$", TEXT, flags=re.MULTILINE)
    left_out = {f"{evidence_plan.BASE} without {what}" for what, _, _ in evidence_plan.ABLATIONS}
    assert {row for row in rows if row in names} == names - left_out
    for what, _, paper in evidence_plan.ABLATIONS:
        assert re.search(rf"^\| {what} \| .+ \| {re.escape(paper)} \|$", TEXT, flags=re.MULTILINE), what


def test_other_commands() -> None:
    for command in re.findall(r"`(--recipe [^`]+)`", TEXT):
        assert parse(shlex.split(command)).stage
