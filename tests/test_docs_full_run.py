"""docs/full_run.md says what its commands print."""

from __future__ import annotations

import re
from pathlib import Path

from bench import full_run
from pipeline.command_line import parse
from pipeline.config import ORIGINAL

TEXT = (Path(__file__).parent.parent / "docs" / "full_run.md").read_text(encoding="utf-8")


def test_table_is_what_the_model_predicts() -> None:
    assert full_run.table() in TEXT, "put the table of python -m bench.full_run into docs/full_run.md"
    plan = full_run.Plan(36, 3 * 36)
    assert f"--rate 36` says {plan.hours:.0f} hours, {plan.hours / 24:.0f} days" in TEXT


def test_commands_and_schedule_are_the_programs() -> None:
    (command,) = re.findall(r"^python run_pipeline\.py (.*)$", TEXT, flags=re.MULTILINE)
    assert parse(command.split()).recipe == ORIGINAL.recipe
    first, second, third = [epoch for epoch, _ in ORIGINAL.train.lr[1:]]
    assert f"must fall at epochs {first}, {second} and {third}" in TEXT
    assert (
        f"trains {ORIGINAL.train.epochs} epochs, evaluates with {'ten' if ORIGINAL.eval.views == 10 else '?'}" in TEXT
    )
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (Path(__file__).parent.parent / "docs" / link).is_file(), link
