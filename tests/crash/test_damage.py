"""A short form of the damage test; the long one is ``python -m tests.crash --cases 10000``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.crash.damage import READS, damage_many, damaged


def test_damage_is_refused_by_name_or_harmless(tmp_path: Path) -> None:
    report = damage_many(tmp_path, 300, seed=1, say=None)
    assert report.cases == 300
    assert set(report.refused) == set(READS)
    assert report.refused.total() > 200


def test_damage_always_changes_something() -> None:
    random = np.random.default_rng(0)
    data = random.bytes(10_000)
    assert all(damaged(data, random) != data for _ in range(500))
    assert {len(damaged(data, random)) == 10_000 for _ in range(100)} == {True, False}
    assert damaged(b"", random) != b""
    assert all(damaged(bytes(10_000), random) != bytes(10_000) for _ in range(100))
