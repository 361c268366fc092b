"""docs/cluster.md says what the model of the exchange predicts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from bench import scaling

TEXT = (Path(__file__).parent.parent / "docs" / "cluster.md").read_text(encoding="utf-8")


def _rows(lines: Iterable[str]) -> dict[tuple[str, ...], list[float]]:
    """The table's times, rate and efficiency by machine, gradients and batch of a GPU."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| 8 (GPUs|boxes)", line)
    ]
    return {tuple(row[:3]): [float(cell.replace(",", "").rstrip("%")) for cell in row[4:]] for row in cells}


def test_table_is_what_the_model_predicts() -> None:
    written, predicted = _rows(TEXT.splitlines()), _rows(scaling.predicted())
    assert len(predicted) == 2 * 4 * len(scaling.NETS)
    assert written.keys() == predicted.keys()
    for row, numbers in predicted.items():
        assert written[row] == pytest.approx(numbers, rel=0.02, abs=0.01), (
            f"{row}: put the table of python -m bench.scaling --model into docs/cluster.md, and read the text below it"
        )
