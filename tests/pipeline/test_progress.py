"""Progress in a log file: a plain line now and then, one at the end, and nothing torn by messages."""

from __future__ import annotations

import re

import pytest

from pipeline import progress as p


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(p.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_every_few_seconds_and_at_the_end(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    with p.Progress("train", 100, "steps") as progress:
        for _ in range(8):
            clock[0] += 1
            progress.show("loss 2.5")
            progress.advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "train: 50/100 steps, 10/s, 0:00:05 left, loss 2.5",
        "train: 80/100 steps, 10/s, 0:00:02 left, loss 2.5",
    ]


def test_rate_counts_only_what_was_done_here(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    with p.Progress("train", 1000, "steps", done=500) as progress:
        clock[0] += 10
        progress.advance(20)
    assert capsys.readouterr().err == "train: 520/1000 steps, 2/s, 0:04:00 left\n"


@pytest.mark.parametrize(("done", "rate"), [(1, "0.1"), (9_994, "999"), (9_996, "1,000"), (15_700, "1,570")])
def test_the_rate_is_a_plain_number(done: int, rate: str, clock: list[float], capsys: pytest.CaptureFixture) -> None:
    with p.Progress("verify", 20_000, "MB") as progress:
        clock[0] += 10
        progress.advance(done)
    assert f" MB, {rate}/s, " in capsys.readouterr().err


def test_nothing_done_prints_nothing(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    with p.Progress("evaluate", 10, "images"):
        pass
    assert capsys.readouterr().err == ""


def test_what_was_told_last_stays_shown(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    with p.Progress("train", 10, "steps") as progress:
        clock[0] += 1
        progress.show("loss 2.5")
        progress.advance(2)
    assert capsys.readouterr().err == "train: 2/10 steps, 2/s, 0:00:04 left, loss 2.5\n"


def test_a_loss_known_late_is_still_told(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    with p.Progress("train", 1, "steps") as progress:
        clock[0] += 10
        progress.advance(1)
        progress.show("loss 2.5")
    assert capsys.readouterr().err.splitlines() == [
        "train: 1/1 steps, 0.1/s, 0:00:00 left",
        "train: 1/1 steps, 0.1/s, 0:00:00 left, loss 2.5",
    ]


def test_messages_stand_on_lines_of_their_own(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    with p.Progress("train", 10, "steps") as progress:
        progress.advance(1)
        progress.say("epoch 1 done")
    assert re.fullmatch(r"epoch 1 done\ntrain: 1/10 steps, .*\n", capsys.readouterr().err)


def test_on_a_terminal_a_bar_with_rate_and_rest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(p.sys.stderr, "isatty", lambda: True, raising=False)
    with p.Progress("train", 10, "steps", done=2) as progress:
        progress.show("loss 2.5")
        progress.advance(3)
        progress.say("epoch 1 done")
        progress.advance(5)
    shown = capsys.readouterr().err
    assert "train: 100%" in shown
    assert "10/10" in shown
    assert "loss 2.5" in shown
    assert re.search(r"(^|[\r\n])epoch 1 done\n", shown)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (360_000, "100:00:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert p.duration(seconds) == text


def test_volume() -> None:
    assert [p.volume(n) for n in (0, 1_500_000, 999_000_000, 1_000_000_000)] == ["0 MB", "2 MB", "999 MB", "1.0 GB"]
