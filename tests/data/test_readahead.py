"""Reading ahead: every piece once and in order, one group ahead, errors and an early end at the right place."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.readahead import reading_ahead, total_memory
from pipeline.errors import PipelineError


@pytest.fixture(autouse=True)
def _no_thread_and_no_open_file_is_left(tmp_path: Path) -> Iterator[None]:
    # By name and place, for whatever ran before in this process may still open and close files of its own.
    yield
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()]
    assert not [file for file in map(os.path.realpath, Path("/dev/fd").iterdir()) if file.startswith(str(tmp_path))]


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


def test_a_batch_on_both_sides_of_a_groups_end_waits_for_both(tmp_path: Path):
    file = tmp_path / "shard"
    file.write_bytes(bytes(100))

    def pieces(group: int) -> list[tuple[Path, int, int]]:
        return [(file if group == 0 else tmp_path / "gone", 0, 9)]

    with reading_ahead(str, lambda number: range(number, number + 2), pieces, 0, 1) as plan:
        with pytest.raises(PipelineError, match=r"cannot read .*gone"):
            plan(0)


def test_a_read_that_brings_less_than_asked_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "shard"
    file.write_bytes(bytes(100))
    asked, read = [], os.preadv

    def some(handle: int, buffers: list[memoryview], offset: int) -> int:
        asked.append((offset, len(buffers[0])))
        return read(handle, [buffers[0][:4]], offset)

    monkeypatch.setattr(os, "preadv", some)
    with reading_ahead(str, groups_of, lambda _: [(file, 20, 10)], 0, 3) as plan:
        plan(0)
    assert asked == [(20, 10), (24, 6), (28, 2)]


def test_memory_is_that_of_this_machine():
    assert 1 << 28 < total_memory() < 1 << 50


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("0::/slurm/job_7/step_0", "sys/fs/cgroup/slurm/job_7/memory.max"),
        ("0::/", "sys/fs/cgroup/memory.max"),
        ("9:cpu,memory:/job", "sys/fs/cgroup/memory/job/memory.limit_in_bytes"),
        ("9:memory:/elsewhere/job", "sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ],
)
def test_memory_is_the_least_limit_of_the_control_groups(tmp_path: Path, line: str, file: str):
    assert total_memory(tmp_path) == total_memory(tmp_path / "nothing")  # no control groups at all
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"1:name=systemd:/job\n{line}\n")
    limit = tmp_path / file
    limit.parent.mkdir(parents=True)
    limit.write_text("123456789\n")
    assert total_memory(tmp_path) == 123456789
    limit.write_text("max\n")
    assert total_memory(tmp_path) == total_memory(tmp_path / "nothing")


def test_each_piece_is_announced_once_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "shard"
    file.write_bytes(bytes(10_000))
    seen: list[tuple[str, int]] = []
    advise, read = os.posix_fadvise, os.preadv

    def announced(handle: int, offset: int, length: int, what: int) -> None:
        assert (length, what) == (10, os.POSIX_FADV_WILLNEED)
        seen.append(("announced", offset))
        advise(handle, offset, length, what)

    def reads(handle: int, buffers: list[memoryview], offset: int) -> int:
        seen.append(("read", offset))
        return read(handle, buffers, offset)

    monkeypatch.setattr(os, "posix_fadvise", announced)
    monkeypatch.setattr(os, "preadv", reads)
    with reading_ahead(str, lambda _: range(1), lambda _: [(file, 10 * i, 10) for i in range(9)], 0, 1) as plan:
        plan(0)
    assert [what for what in seen if what[0] == "announced"] == [("announced", 10 * i) for i in range(9)]
    assert [what for what in seen if what[0] == "read"] == [("read", 10 * i) for i in range(9)]
    for i in range(9):
        before = seen[: seen.index(("read", 10 * i))]
        assert ("announced", 10 * min(i + 3, 8)) in before  # three more than the one that is read
        assert ("announced", 10 * (i + 4)) not in before


def test_a_system_without_advice_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on macOS: the kernel is told nothing, and nothing else changes."""
    monkeypatch.delattr(os, "posix_fadvise")
    file = tmp_path / "shard"
    file.write_bytes(bytes(100))
    with reading_ahead(str, groups_of, lambda g: [(file, 0, 9), (file, 9, 9)], 0, 9) as plan:
        assert plan(8) == "8"
