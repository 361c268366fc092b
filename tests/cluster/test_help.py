"""The long forms beside the tests say what they do when asked, and start nothing for it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from tests.cluster import machines, slurm


def started(*_: object, **__: object) -> None:
    raise AssertionError("work was started")


@pytest.mark.parametrize("module", [machines, slurm])
@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("mistyped", 2)])
def test_help_starts_no_work(
    module: ModuleType, argument: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["module", argument])
    monkeypatch.setattr(module.signal, "signal", started)
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == status
    said = capsys.readouterr()
    for name in module.SCENARIOS:
        assert name in said.out + said.err
