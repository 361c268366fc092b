"""A short form of the crash test; the long one is ``python -m tests.crash --kills 200``."""

from __future__ import annotations

from pathlib import Path

from tests.crash.kills import PLACES, kill_at_places


def test_killed_at_narrow_places_and_started_again_ends_the_same(tmp_path: Path) -> None:
    report = kill_at_places(tmp_path)
    assert report.kills == {stage: len(kills) for stage, kills in PLACES.items()}
    assert report.half_written.total() == report.kills.total()  # each fell between opening a file and renaming it
