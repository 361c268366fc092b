"""A run in progress seen from outside, and the same metrics as TensorBoard events."""

from __future__ import annotations

import json
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import run_pipeline
from pipeline.config import RECIPES
from pipeline.metrics import MetricsLog, read_metrics
from pipeline.run_dir import move_aside, read_sealed, write_sealed
from pipeline.tensorboard import events
from stages import watch
from stages.watch import braille, screen
from tests.net.test_weights import needed


def step(number: int, loss: float) -> dict:
    return {"step": number, "epoch": 0, "loss": loss, "lr": 0.01, "images_per_second": 64.0, "data_wait": 0.25}


def test_screen_says_how_far_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [step(10, 2.5), step(20, 2.0)]
    records.append({"step": 20, "epochs_done": 1, "top1": 0.4, "top5": 0.9, "validation_loss": 1.8, "seconds": 1.0})
    records += [step(30, 1.5)]
    records[0]["images_per_second"] = 0.5  # compiling
    records.append({"step": 40, "epochs_done": 2, "top1": 0.3, "top5": 0.8, "validation_loss": 1.9, "seconds": 1.0})
    demo = RECIPES["demo"]  # 4 epochs, batches of 32
    text = screen(Path("runs/x"), demo, 20, 12, records, time.time() - 61, 80, 24)
    assert "step 40 of 80  epoch 2.00 of 4" in text
    assert "loss 1.5000  lr 0.01  64.0 images/s  waiting for data 25.0%" in text
    assert "0:00:20 left" in text  # 40 steps of 32 at 64 a second
    assert "last line 0:01:01 ago" in text
    assert "top-1 30.00%  top-5 80.00%  loss 1.9000" in text
    assert "best 40.00%, step 20" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert len(text.splitlines()) <= 24
    records[-1] |= {"step": 899_996, "top1": 0.5}
    assert "best 50.00%, step 899,996" in screen(Path("runs/x"), demo, 20, 12, records, time.time(), 80, 24)  # whole
    records[-1] |= {"step": 40, "top1": 0.3}
    assert "the recipe's end; last line" in screen(Path("runs/x"), demo, 10, 12, records, time.time(), 80, 24)
    assert "no step has been logged yet" in screen(Path("runs/x"), demo, 20, 12, [], time.time(), 80, 24)
    beyond = screen(Path("runs/x"), demo, 20, 12, [*records, step(90, 1.0)], time.time(), 80, 24)
    assert "the recipe's end; last line" in beyond
    assert "step 90, the recipe has 80  epoch 4.50, the recipe has 4" in beyond
    assert "no step has been logged yet" in screen(Path("runs/x"), demo, 20, 12, records[-1:], time.time(), 80, 24)
    # Lines that others have written into the file, or half of one, are left out.
    odd = [{"stfp": 3, "loss": 1.0}, {**step(35, 1.0), "loss": None}, {"step": 36, "top1": 0.9}, {"step": "x"}, {}]
    assert screen(Path("runs/x"), demo, 10, 12, records + odd, time.time(), 80, 24) == screen(
        Path("runs/x"), demo, 10, 12, records, time.time(), 80, 24
    )


def test_the_time_left_is_that_of_the_last_lines_speed() -> None:
    records = [{**step(number, 1.0), "images_per_second": 1.0 if number <= 20 else 64.0} for number in range(1, 31)]
    text = screen(Path("runs/x"), RECIPES["demo"], 20, 12, records, time.time(), 80, 24)
    assert "64.0 images/s" in text
    assert "0:00:25 left" in text  # 50 steps of 32


def test_the_screen_fits_a_narrow_terminal_and_one_without_braille(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [step(10, 2.5), step(30, 1.5)]

    def lines() -> list[str]:
        return screen(Path("runs/" + "x" * 60), RECIPES["demo"], 20, 12, records, time.time(), 40, 24).splitlines()

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="utf-8"))
    curve = lines()
    assert curve[-1].split() == ["0.50", "1.50"]  # epochs
    assert max(map(len, curve)) <= 40
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="ascii"))
    assert lines() == curve[:4]


def test_one_logged_line_is_no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="utf-8"))
    text = screen(Path("runs/x"), RECIPES["demo"], 20, 12, [step(10, 2.5)], time.time(), 80, 24)
    assert text.endswith("the loss curve begins with the second logged line")
    assert not any(0x2800 <= ord(sign) < 0x2900 for sign in text)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="ascii"))  # where there will never be one
    assert "curve" not in screen(Path("runs/x"), RECIPES["demo"], 20, 12, [step(10, 2.5)], time.time(), 80, 24)


def test_braille_draws_what_it_is_given() -> None:
    falling = braille([(0.0, 1.0), (1.0, 0.0)], 4, 2)
    assert falling[0].startswith("   1.000 ⠑⢄")  # a diagonal, from the upper left
    assert falling[1].startswith("   0.000 ")
    assert falling[1].endswith("⠑⢄")
    assert falling[2].split() == ["0.00", "1.00"]
    flat = braille([(0.0, 1.0), (2.0, 1.0)], 10, 2)
    assert set(flat[0].split()[1]) == {"⠉"}
    assert flat[1].startswith("   1.000 ")
    assert braille([(3.0, 1.0)], 10, 2)


def test_watch_prints_once_into_a_pipe(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_pipeline.main(["--stage", "watch", "--run", str(trained_run)]) == 0
    out = capsys.readouterr().out
    assert "step 12 of 540" in out
    assert "validation top-1" in out
    assert "top-5" not in out  # of five classes
    assert "\x1b" not in out


def test_watch_goes_on_while_another_process_starts_the_run_over(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its looks the old metrics go, the configuration is another one, damaged, and the new metrics come."""
    folder, config = run / "train", run / "config.json"
    folder.mkdir()
    line = json.dumps(step(3, 2.0)) + "\n"
    (folder / "metrics.jsonl").write_text(line)

    def another_recipe() -> None:
        values = read_sealed(config, "")
        values["train"]["epochs"] = 7
        write_sealed(config, values)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(line)

    happens = iter((lambda: move_aside(folder), another_recipe, lambda: config.write_text("{}")))

    def sleep(seconds: float) -> None:
        try:
            next(happens)()
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=sleep, time=time.time))
    assert run_pipeline.main(["--stage", "watch", "--run", str(run)]) == 0
    looks = capsys.readouterr().out.split("\x1b[H\x1b[J")[1:]
    assert ["no step has been logged yet" in look for look in looks] == [False, True, False, False]
    assert "step 3 of 540" in looks[0]
    assert all("step 3 of 42" in look for look in looks[2:])


def test_watch_does_not_need_the_lock_and_says_what_is_missing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.run_dir import RunDir, locked

    with locked(RunDir(run)):
        assert run_pipeline.main(["--stage", "watch", "--run", str(run)]) == 1
    assert "nothing has been trained; start it" in capsys.readouterr().err
    config = run / "config.json"
    config.write_text(config.read_text().replace('"epochs": 90', '"epochs": 91'))
    assert run_pipeline.main(["--stage", "watch", "--run", str(run)]) == 1
    assert "edited by hand; name the recipe with --recipe" in capsys.readouterr().err


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Tag, step and value of all events, in order, read by the file format: length, CRC, record, CRC."""
    needed("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.glob("events.out.tfevents.*")
    data, place, found = path.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        event = Event.FromString(data[place + 12 : place + 12 + length])
        place += 16 + length
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def test_events_hold_the_metrics_and_begin_anew(tmp_path: Path) -> None:
    needed("tensorboardX")
    log, folder = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    validation = {"step": 20, "epochs_done": 1, "top1": 0.5, "top5": 0.75, "validation_loss": 1.25, "seconds": 3.0}
    with events(folder, []) as mirror, MetricsLog(log, mirror) as metrics:
        metrics.write(step(10, 2.5))
        metrics.write(validation)
    first = scalars(folder)
    assert ("train/loss", 10, 2.5) in first
    assert ("train/data_wait", 10, 0.25) in first
    assert ("validation/loss", 20, 1.25) in first
    assert ("validation/top5", 20, 0.75) in first
    assert not any("seconds" in tag or "epoch" in tag for tag, _, _ in first)
    with events(folder, read_metrics(log)) as mirror, MetricsLog(log, mirror) as metrics:
        metrics.write(step(30, 1.5))
    assert scalars(folder) == [*first, *[s for s in scalars(folder) if s[1] == 30]]
    assert ("train/loss", 30, 1.5) in scalars(folder)


def test_train_writes_events(run: Path) -> None:
    needed("tensorboardX")
    assert run_pipeline.main(["--stage", "train", "--steps", "2", "--tensorboard", "--run", str(run)]) == 0
    losses = {r["step"]: r["loss"] for r in read_metrics(run / "train" / "metrics.jsonl") if "loss" in r}
    written = {s: value for tag, s, value in scalars(run / "train" / "tensorboard") if tag == "train/loss"}
    assert written == pytest.approx(losses)
    assert len(losses) == 2
    # What was written before a resume is there again, and once.
    assert run_pipeline.main(["--stage", "train", "--resume", "--steps", "1", "--tensorboard", "--run", str(run)]) == 0
    assert [s for tag, s, _ in scalars(run / "train" / "tensorboard") if tag == "train/loss"] == [1, 2, 3]
