"""A short form of the crash test; the long one is ``python -m tests.crash --kills 200``."""

from __future__ import annotations

from pathlib import Path

from tests.crash.kills import STAGES, kill_many


def test_killed_anywhere_and_started_again_ends_the_same(tmp_path: Path) -> None:
    report = kill_many(tmp_path, 4, seed=1, long=False, say=None)
    assert report.kills.total() >= 4
    assert set(report.kills) == set(STAGES)
