"""Reading ahead: every piece once and in order, one group ahead, errors and an early end at the right place."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.readahead import reading_ahead, total_memory
from pipeline.errors import PipelineError


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def groups_of(number: int) -> range:
    return range(number // 3, number // 3 + 1)


def test_a_batch_is_given_out_when_its_group_has_been_read_and_one_group_is_read_ahead(tmp_path: Path):
    file = tmp_path / "shard"
    file.write_bytes(bytes(10_000))
    asked = []

    def pieces(group: int) -> list[tuple[Path, int, int]]:
        asked.append(group)
        return [(file, group * 100, 100), (file, 9_990, 100)]  # the second reaches beyond the end

    with reading_ahead(str, groups_of, pieces, 4, 30) as plan:
        assert plan(4) == "4"
        time.sleep(0.1)
        assert asked == [1, 2]
        assert plan(9) == "9"
        time.sleep(0.1)
        assert asked == [1, 2, 3, 4]
    assert asked == [1, 2, 3, 4]


def test_a_failing_read_is_raised_at_the_batch_that_needs_it(tmp_path: Path):
    file = tmp_path / "shard"
    file.write_bytes(bytes(100))
    with reading_ahead(str, groups_of, lambda g: [(file if g < 1 else tmp_path / "gone", 0, 9)], 0, 9) as plan:
        assert plan(2) == "2"
        with pytest.raises(PipelineError, match=r"cannot read .*gone: No such file"):
            plan(3)
        assert plan(2) == "2"


def test_memory_is_that_of_this_machine():
    assert 1 << 28 < total_memory() < 1 << 50
