"""docs/full_run.md says what its commands print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import full_run
from pipeline.command_line import parse
from pipeline.config import ORIGINAL

TEXT = (Path(__file__).parent.parent / "docs" / "full_run.md").read_text(encoding="utf-8")


def _rows(text: str) -> dict[tuple[str, str, str], list[float]]:
    """The table's numbers by card, precision with batch, and whether the rate was measured."""
    form = r"^\| (.+?) \| ((?:bf16|fp32), \d+) \| (.+?) \| (\**measured\**|predicted) \| (.+) \|$"
    return {
        (card, setting, known.strip("*")): [float(n.replace(",", "")) for n in [rate, *rest.split("|")]]
        for card, setting, rate, known, rest in re.findall(form, text, flags=re.MULTILINE)
    }


def test_table_is_what_was_measured_and_what_the_model_predicts() -> None:
    written, predicted = _rows(TEXT), _rows(full_run.table())
    assert written.keys() == predicted.keys()
    assert len(written) == 2 * len(full_run.PRICES) + 1
    assert [row for row in written if row[2] == "measured"] == [
        (card, f"{precision}, {batch}", "measured") for card, precision, batch in full_run.MEASURED
    ]
    for row, numbers in predicted.items():
        if row[2] == "measured":
            assert written[row][0] == numbers[0]
        # A refined model moves a prediction a little; the page need not follow each time.
        assert written[row] == pytest.approx(numbers, rel=0.1, abs=0.1), (
            f"{row}: put the table of python -m bench.full_run into docs/full_run.md"
        )
    plan = full_run.Plan(97, 3 * 97)
    assert f"--rate 97` says {plan.hours:.0f} hours, {plan.hours / 24:.0f} days" in TEXT


def test_commands_and_schedule_are_the_programs() -> None:
    (command,) = re.findall(r"^python run_pipeline\.py (.*)$", TEXT, flags=re.MULTILINE)
    assert parse(command.split()).recipe == ORIGINAL.recipe
    first, second, third = [epoch for epoch, _ in ORIGINAL.train.lr[1:]]
    assert f"must fall at epochs {first}, {second} and {third}" in TEXT
    assert (
        f"trains {ORIGINAL.train.epochs} epochs, evaluates with {'ten' if ORIGINAL.eval.views == 10 else '?'}" in TEXT
    )
