"""The metrics log: appended line by line, cut back to a step when a run is taken up again."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import PipelineError
from pipeline.metrics import MetricsLog, cut_back, read_metrics


def test_lines_are_readable_while_the_log_is_open_and_appended_later(tmp_path: Path) -> None:
    path = tmp_path / "train" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1, "loss": 0.1})
        assert read_metrics(path) == [{"step": 1, "loss": 0.1}]
        log.write({"step": 2})
        log.sync()
    with MetricsLog(path) as log:
        log.write({"step": 3})
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    assert path.read_text() == '{"step": 1, "loss": 0.1}\n{"step": 2}\n{"step": 3}\n'


def test_a_line_that_the_system_takes_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        write = log._file.write
        monkeypatch.setattr(log, "_file", SimpleNamespace(write=lambda data: write(data[:5]), close=log._file.close))
        log.write({"step": 1, "loss": 0.1})
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": 0.1}]


def test_lines_are_durable_when_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.write({"step": 1})
        assert flushed == []
        log.sync()
    assert flushed == [str(tmp_path / "m.jsonl")]


def test_nan_is_not_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log, pytest.raises(ValueError, match="JSON"):
        log.write({"loss": float("nan")})
    assert read_metrics(tmp_path / "m.jsonl") == []


def test_cut_back_drops_later_steps_and_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    kept = '{"step": 1, "loss": 0.30000000000000004}\n{"step": 2, "epochs_done": 1}\n'
    odd = ["[1]", "[" * 100_000, '{"step": 2, "lo']
    path.write_text(kept + '{"step": 3}\n{"no": "step"}\n{"step": "4"}\n' + "\n".join(odd))
    cut_back(path, 2)
    assert path.read_text() == kept
    with MetricsLog(path) as log:
        log.write({"step": 3})
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_cut_back_leaves_a_log_alone_that_ends_with_the_step(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    os.utime(path, (1e9, 1e9))
    cut_back(path, 2)
    assert path.stat().st_mtime == 1e9
    cut_back(path, 1)
    assert path.stat().st_mtime > 1e9


def test_cut_back_without_a_log_leaves_an_empty_one(tmp_path: Path) -> None:
    cut_back(tmp_path / "new" / "m.jsonl", 5)
    assert (tmp_path / "new" / "m.jsonl").read_bytes() == b""
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_full_disk_is_told_plainly(small_disk: Path) -> None:
    def fill() -> None:
        with MetricsLog(small_disk / "m.jsonl") as log:
            for step in range(100_000):
                log.write({"step": step, "loss": 1 / 3, "text": "x" * 100})

    with pytest.raises(PipelineError, match=r"the disk is full: cannot write .*m\.jsonl"):
        fill()
    records = read_metrics(small_disk / "m.jsonl")
    assert [r["step"] for r in records] == list(range(len(records)))
    assert len(records) > 5000


def test_read_only_folder_is_told_plainly(read_only_disk: Path) -> None:
    with pytest.raises(PipelineError, match=r"no permission to write .*m\.jsonl"):
        MetricsLog(read_only_disk / "m.jsonl")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_file_can_be_cut_back(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + content + b'\n{"step": 2}\n')
    cut_back(path, 1)
    assert {"step": 1} in read_metrics(path)
    assert {"step": 2} not in read_metrics(path)
