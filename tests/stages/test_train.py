"""Training through the command line: resumed runs are the undisturbed run, bit for bit; nothing good is overwritten."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest

import net.cpu
import run_pipeline
from net import backend, reference
from pipeline.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from pipeline.config import RECIPES
from pipeline.config_values import changes
from pipeline.errors import PipelineError
from pipeline.metrics import read_metrics
from pipeline.ranks import ALONE, Ranks
from pipeline.run_dir import RunDir
from stages import losses, trainer
from stages import start as start_stage
from stages import train as train_stage
from stages.batches import TrainingPlan
from stages.losses import Plateau
from stages.start import State
from tests.command_line import finish, pipeline, settings, start, wait_until

STEPS_AN_EPOCH = 6  # 22 pictures, batches of 4: the last has two
TIMES = ("images_per_second", "data_wait", "seconds")

# The authors' recipe with its schedule pulled together: within two epochs every rate changes and the jitter ends.
CROSSING = settings(
    "train.lr=[[0,0.01],[1,0.001]]",
    "train.bias_lr=[[0,0.02]]",
    "train.conv1_lr=[[1,0.00001]]",
    "input.jitter_epochs=1",
    "network.weight_std=[0.01,0.01,0.03,0.03,0.03,0.01,0.01,0.01]",
    "network.relu_before_lrn=false",
    "network.map_norm=true",
    "network.lrn_alpha_over_n=true",
    "train.bias_decay=false",
    "input.jitter_rescale=true",
    "input.mean=center",
    "input.scale=1.0",
)


def train(run: Path, *arguments: object):
    return pipeline("--stage", "train", "--run", run, *arguments)


def newest(run: Path) -> Path:
    return checkpoints(run / "train")[-1]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics(run: Path) -> list[dict]:
    """The metrics lines but for times."""
    records = read_metrics(run / "train" / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def test_a_new_run_is_drawn_while_its_backend_loads_and_a_resumed_one_not_at_all(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    load, drawing = backend.load, start_stage.drawing

    @contextlib.contextmanager
    def noted_drawing(*how: object) -> Iterator[Callable[[], dict[str, np.ndarray]]]:
        order.append("drawing")
        with drawing(*how) as drawn:
            yield lambda: order.append("drawn") or drawn()

    monkeypatch.setattr(start_stage, "drawing", noted_drawing)
    monkeypatch.setattr(backend, "load", lambda *names: order.append("load") or load(*names))
    command = ["--stage", "train", "--run", str(run), "--device", "reference", "--steps", "1"]
    assert run_pipeline.main(command) == 0
    assert order == ["drawing", "load", "drawn"]
    order.clear()
    assert run_pipeline.main([*command, "--resume"]) == 0
    assert order == ["load"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Path]:
    """Nine steps at once: one epoch with its validation and a half."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(prepared, run)
    said = train(run, "--steps", 9).done().err
    assert re.search(r"validation top-1 \d+\.\d+%, loss ", said), said  # of five classes, top-5 says nothing
    yield run
    shutil.rmtree(run)


def test_metrics_lines_hold_what_scripts_rely_on(undisturbed: Path) -> None:
    records = read_metrics(undisturbed / "train" / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 10))
    assert [r["epoch"] for r in steps] == [0] * 6 + [1] * 3
    for record in steps:
        assert set(record) == {"step", "epoch", "loss", "lr", "images_per_second", "data_wait"}
        assert 0 < record["loss"] < 10
        assert record["lr"] == pytest.approx(0.01)
        assert record["images_per_second"] > 0
        assert 0 <= record["data_wait"] <= 1
    validations = [r for r in records if "top1" in r]
    assert [(r["step"], r["epochs_done"]) for r in validations] == [(6, 1)]
    assert {"top1", "top5", "validation_loss"} <= set(validations[0])
    # Lines are in the order things happened.
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)


def test_checkpoints_are_at_the_epochs_end_and_at_the_end(undisturbed: Path) -> None:
    folder = undisturbed / "train"
    assert [p.name for p in checkpoints(folder)] == ["step-00000006.ckpt", "step-00000009.ckpt"]
    assert json.loads((folder / "latest.json").read_text())["step"] == 9
    assert json.loads((folder / "best.json").read_text())["step"] == 6
    assert not list(folder.glob("*.tmp"))
    saved = load_checkpoint(newest(undisturbed))
    assert saved.header["config"]["train"]["batch_size"] == 4
    assert saved.header["classes"] == 5
    assert saved.header["wnids"] == [f"class{i}" for i in range(5)]
    names = {
        f"{layer}.{kind}"
        for layer in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
        for kind in "wb"
    }
    assert set(saved.arrays) == names | {f"momentum/{name}" for name in names}
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in saved.arrays.values())
    assert np.abs(saved.arrays["momentum/fc8.w"]).max() > 0


def test_stopped_and_resumed_is_the_undisturbed_run(run: Path, undisturbed: Path) -> None:
    first = 4
    train(run, "--steps", first).done()
    result = train(run, "--resume", "--steps", 9 - first).done()
    assert f"resumed from {run}/train/step-{first:08d}.ckpt, step {first}" in result.out
    assert digest(newest(run)) == digest(newest(undisturbed))
    assert metrics(run) == metrics(undisturbed)
    assert (run / "train" / "best.json").read_bytes() == (undisturbed / "train" / "best.json").read_bytes()


def test_sigterm_saves_and_stops_and_resume_goes_on_to_the_same_end(run: Path, undisturbed: Path) -> None:
    process = start("--stage", "train", "--run", run, "--steps", 9)
    wait_until(lambda: len(metrics(run)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.status == 143, result
    done = json.loads((run / "train" / "latest.json").read_text())["step"]
    assert 2 <= done < 9
    assert f"stopped at step {done}, everything is saved; go on with:" in result.err
    assert f"--stage train --resume --run {run}" in result.err
    assert "Traceback" not in result.err
    train(run, "--resume", "--steps", 9 - done).done()
    assert digest(newest(run)) == digest(newest(undisturbed))
    assert metrics(run) == metrics(undisturbed)


def test_resume_is_exact_across_every_change_of_the_schedule(run: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    try:
        train(whole, "--steps", 7, *CROSSING).done()
        train(run, "--steps", 5, *CROSSING).done()
        train(run, "--resume", "--steps", 2).done()
        assert digest(newest(run)) == digest(newest(whole))
        assert metrics(run) == metrics(whole)
        rates = [record["lr"] for record in metrics(run) if "lr" in record]
        assert rates == pytest.approx([0.01] * 6 + [0.001])
        # Colour shifts rescale training's input alone: validation and evaluation agree that theirs is not.
        assert run_pipeline.main(["--stage", "eval", "--run", str(run), "--checkpoint", "best"]) == 0
        (validation,) = (record for record in metrics(run) if "validation_loss" in record)
        assert json.loads((run / "eval" / "metrics.json").read_text())["loss"] == validation["validation_loss"]
    finally:
        shutil.rmtree(whole)


def test_damaged_newest_checkpoint_gives_way_to_the_older_one(run: Path, undisturbed: Path) -> None:
    shutil.copytree(undisturbed / "train", run / "train")
    path = newest(run)
    path.write_bytes(path.read_bytes()[:-1000])
    result = train(run, "--resume", "--steps", 3).done()
    assert f"warning: the checkpoint {path} is damaged" in result.out
    assert "resumed from" in result.out
    assert "step 6" in result.out
    assert digest(newest(run)) == digest(newest(undisturbed))
    assert metrics(run) == metrics(undisturbed)


def test_train_where_checkpoints_lie_names_both_ways_on(run: Path, undisturbed: Path) -> None:
    shutil.copytree(undisturbed / "train", run / "train")
    before = {path.name: path.read_bytes() for path in (run / "train").iterdir()}
    config = (run / "config.json").read_bytes()
    train(run, "--steps", 1, "--set", "train.batch_size=2").refused(r"step 9; add --resume .*--restart")
    assert {path.name: path.read_bytes() for path in (run / "train").iterdir()} == before
    assert (run / "config.json").read_bytes() == config

    result = train(run, "--restart", "--steps", 1).done()
    assert f"the old checkpoints and metrics are in {run}/train.old-1" in result.out
    assert {path.name: path.read_bytes() for path in (run / "train.old-1").iterdir()} == before
    assert [path.name for path in checkpoints(run / "train")] == ["step-00000001.ckpt"]
    assert metrics(run) == metrics(undisturbed)[:1]


@pytest.fixture
def begun(run: Path) -> Path:
    """A run with something in the place of a checkpoint: whoever does not resume does not read it."""
    (run / "train").mkdir()
    for name in ("step-00000009.ckpt", "latest.json", "metrics.jsonl"):
        (run / "train" / name).write_text(name)
    return run


def test_checkpoints_in_the_way_are_told_before_anything_is_loaded_or_drawn(
    begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order = []
    monkeypatch.setattr(start_stage, "drawing", lambda *how: order.append("drawing"))
    monkeypatch.setattr(backend, "load", lambda *names: order.append("load"))
    assert run_pipeline.main(["--stage", "train", "--run", str(begun)]) == 1
    assert "holds checkpoints up to step 9; add --resume" in capsys.readouterr().err
    assert order == []


def restart_is_refused(run: Path, *arguments: str) -> None:
    """In whatever way; nothing of the run has changed but its lock, which names the last process."""

    def contents() -> dict[str, bytes]:
        files = [path for path in run.rglob("*") if path.is_file() and path.name != "lock"]
        return {str(path.relative_to(run)): path.read_bytes() for path in files}

    before = contents()
    command = ["--stage", "train", "--restart", "--run", str(run), "--device", "reference", "--steps", "1"]
    assert run_pipeline.main([*command, "--set", "train.momentum=0.5", *arguments]) == 1
    assert contents() == before


def fail(*_: object, **__: object) -> NoReturn:
    raise PipelineError("as the test wants it")


@contextlib.contextmanager
def drawing_that_fails(*how: object) -> Iterator[Callable[[], NoReturn]]:
    yield fail


@contextlib.contextmanager
def beside_a_rank_that_fails() -> Iterator[Ranks]:
    yield replace(ALONE, wait=fail)


@pytest.mark.parametrize(
    ("where", "name", "failing"),
    [
        pytest.param(backend, "load", fail, id="backend"),
        pytest.param(start_stage, "require_memory", fail, id="memory"),
        pytest.param(start_stage, "drawing", drawing_that_fails, id="drawing"),
        pytest.param(reference, "asarray", fail, id="device"),
        pytest.param(run_pipeline, "joined", beside_a_rank_that_fails, id="rank"),
    ],
)
def test_a_restart_that_fails_leaves_the_run_as_it_was(
    where: ModuleType,
    name: str,
    failing: Callable[..., object],
    begun: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(where, name, failing)
    restart_is_refused(begun)
    assert capsys.readouterr().err == "error: as the test wants it\n"


def test_a_restart_without_tensorboard_leaves_the_run_as_it_was(
    begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    restart_is_refused(begun, "--tensorboard")
    assert "--tensorboard needs tensorboardX" in capsys.readouterr().err


def test_resume_with_nothing_to_resume_starts_and_says_so(run: Path) -> None:
    (run / "train").mkdir()  # by a run that ended before its first checkpoint
    (run / "train" / "metrics.jsonl").write_text('{"step": 3, "loss": 9.0}\n')
    (run / "train" / "step-00000006.ckpt.tmp").write_text("cut off")
    result = train(run, "--resume", "--steps", 1).done()
    assert f"there is nothing to resume in {run}/train: training starts from the beginning" in result.out
    assert newest(run).name == "step-00000001.ckpt"
    assert [record["step"] for record in metrics(run)] == [1]
    assert not list((run / "train").glob("*.tmp"))


def test_epochs_and_the_recipes_end(run: Path) -> None:
    train(run, "--epochs", 1, "--set", "train.epochs=1").done()
    assert newest(run).name == f"step-{STEPS_AN_EPOCH:08d}.ckpt"
    indexes = {path: path.read_bytes() for path in (run / "train" / "latest.json", run / "train" / "best.json")}
    for path in indexes:
        path.unlink()  # as a crash before they were written leaves it
    result = train(run, "--resume").done()
    assert {path: path.read_bytes() for path in indexes} == indexes
    assert "nothing to train: 6 steps are done; add --epochs N or --steps N to train on" in result.out


def test_a_full_disk_does_not_matter_where_nothing_is_to_be_trained(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--stage", "train", "--run", str(run), *settings("train.epochs=1", "train.batch_size=22")]
    assert run_pipeline.main(command) == 0
    monkeypatch.setattr(start_stage.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert run_pipeline.main([*command, "--resume"]) == 0
    assert "nothing to train" in capsys.readouterr().out
    assert run_pipeline.main([*command, "--resume", "--steps", "1"]) == 1
    assert "has 0 MB free, but a checkpoint needs" in capsys.readouterr().err


def test_checkpoint_every_and_keep(run: Path) -> None:
    train(run, "--steps", 3, *settings("train.checkpoint_every=1", "train.keep_checkpoints=1")).done()
    assert [path.name for path in checkpoints(run / "train")] == ["step-00000003.ckpt"]


def test_validation_and_checkpoints_only_every_so_many_epochs(run: Path, undisturbed: Path) -> None:
    rarely = settings("train.validate_every=2", "train.save_every=3")
    train(run, "--epochs", 5, *rarely).done()
    validations = [r["epochs_done"] for r in metrics(run) if "top1" in r]
    assert validations == [2, 4, 5]  # the last epoch always
    assert [path.name for path in checkpoints(run / "train")] == ["step-00000018.ckpt", "step-00000030.ckpt"]
    header = load_checkpoint(run / "train" / "step-00000018.ckpt").header
    assert header["validation"] is None
    assert json.loads((run / "train" / "best.json").read_text())["step"] == 30
    # Nothing but the lines differs: the losses are those of a run that validates and saves every epoch.
    losses = [r for r in metrics(undisturbed) if "loss" in r]
    assert [r for r in metrics(run) if "loss" in r][: len(losses)] == losses
    # And a run may go on with other intervals than it began with.
    train(run, "--resume", "--epochs", 1, "--set", "train.validate_every=1", "--set", "train.save_every=1").done()
    assert checkpoints(run / "train")[-1].name == "step-00000036.ckpt"


def test_steps_are_numbered_for_dropout_and_logged_every_so_many_and_at_the_end(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that stayed would switch off the same units for ever; the metrics would look as always."""
    numbers, upload = [], net.cpu.upload
    monkeypatch.setattr(net.cpu, "upload", lambda arrays: numbers.append(arrays["step"].tolist()) or upload(arrays))
    command = ["--stage", "train", "--run", str(run), "--device", "cpu", "--steps", "3"]
    assert run_pipeline.main([*command, *settings("train.batch_size=2", "train.log_every=2")]) == 0
    assert numbers == [[0], [1], [2]]
    assert [record["step"] for record in metrics(run)] == [2, 3]


def test_divergence_stops_training_and_keeps_the_last_good_checkpoint(run: Path, undisturbed: Path) -> None:
    shutil.copytree(undisturbed / "train", run / "train")
    good = {path.name: digest(path) for path in checkpoints(run / "train")}
    sentence = train(run, "--restart", "--steps", 6, "--set", "train.lr=[[0,1e12]]").refused(
        r"the loss is (nan|inf) at step \d+|not finite at step \d+", "diverged; the last good checkpoint is kept"
    )
    assert "in a new run (--run)" in sentence
    assert checkpoints(run / "train") == []
    assert {path.name: digest(path) for path in checkpoints(run / "train.old-1")} == good


def test_plateau_is_told_once_and_names_the_cure(run: Path) -> None:
    result = train(
        run,
        "--steps",
        5,
        *settings(
            "train.lr=[[0,0.0]]",
            "train.plateau_steps=2",
            "network.weight_std=[1e-6,1e-6,1e-6,1e-6,1e-6,1e-6,1e-6,1e-6]",
        ),
    ).done()
    assert result.err.count("warning: the loss has stayed at 1.609, which is ln(classes) = 1.609, for 2 steps") == 1
    assert "--recipe original" in result.err


def test_plateau_needs_patience_and_a_level_loss() -> None:
    plateau = Plateau(1000, 5)
    level = math.log(1000)
    assert not any(plateau.stays(step, level + 0.019) for step in range(1, 6))
    assert not plateau.stays(6, level - 0.021)  # left the level: counting starts again
    assert not any(plateau.stays(step, level) for step in range(7, 12))
    assert plateau.stays(12, level)
    assert not plateau.stays(13, level)


def test_a_single_class_is_no_plateau() -> None:
    plateau = Plateau(1, 2)
    assert not any(plateau.stays(step, 0.0) for step in range(1, 9))


def test_metrics_are_on_the_disk_before_the_checkpoint_and_indexes_and_removals_come_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, path = [], tmp_path / "step-00000001.ckpt"
    monkeypatch.setattr(train_stage, "save_checkpoint", lambda *given: order.append("saved") or path)
    monkeypatch.setattr(train_stage, "note_best", lambda *given: order.append(("best", *given[1:])))
    monkeypatch.setattr(train_stage, "prune", lambda *given: order.append(("pruned", *given[1:])))
    log = SimpleNamespace(sync=lambda: order.append("synced"))
    header = {"validation": {"top1": 0.5, "top5": 0.9}}
    train_stage.save(RunDir(tmp_path), reference, log, 3, State(1, {}, {}), header)
    assert order == ["synced", "saved", ("best", path, 1, 0.5), ("pruned", 3, path)]


def test_writing_a_checkpoint_does_not_count_as_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, save = [0.0], train_stage.save_checkpoint
    for module in (trainer, losses):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(*given: Any) -> Path:
        now[0] += 1000
        return save(*given)

    monkeypatch.setattr(train_stage, "save_checkpoint", slow)
    assert run_pipeline.main(["--stage", "train", "--run", str(run), "--steps", "8"]) == 0
    assert now[0] == 2000  # an epoch's end and the run's
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["images_per_second"] > 1 for line in lines if "images_per_second" in line)


def test_a_resume_does_what_a_crash_after_a_checkpoint_left_undone(undisturbed: Path, tmp_path: Path) -> None:
    """Also where the best checkpoint is not the newest, or is it only now, and where older ones should have gone."""
    run, nothing = tmp_path / "run", settings("train.epochs=1", "train.keep_checkpoints=1")
    shutil.copytree(undisturbed, run)
    best = run / "train" / "best.json"
    before = best.read_bytes()
    best.unlink()
    assert "nothing to train" in train(run, "--resume", *nothing).done().out
    assert best.read_bytes() == before
    assert [path.name for path in checkpoints(run / "train")] == ["step-00000006.ckpt", "step-00000009.ckpt"]
    saved = load_checkpoint(newest(run))
    better = {"top1": 1.0, "top5": 1.0, "loss": 0.1}
    save_checkpoint(run / "train", 12, {**saved.header, "validation": better}, saved.arrays)
    assert "nothing to train" in train(run, "--resume", *nothing).done().out
    assert json.loads(best.read_text())["step"] == 12
    assert [path.name for path in checkpoints(run / "train")] == ["step-00000012.ckpt"]
    shutil.rmtree(run)


def test_a_checkpoint_made_in_another_way_is_gone_on_from_with_a_word(undisturbed: Path, tmp_path: Path) -> None:
    run, nothing = tmp_path / "run", settings("train.epochs=1", "train.keep_checkpoints=1")
    shutil.copytree(undisturbed, run)
    saved = load_checkpoint(newest(run))
    config = {**saved.header["config"], "train": {**saved.header["config"]["train"], "order": "auto"}}
    header = {**saved.header, "config": config, "device": "gpu", "precision": "bf16", "ranks": 3}
    save_checkpoint(run / "train", 12, header, saved.arrays)
    told = train(run, "--resume", *nothing).done().out
    assert "so far it was trained on the gpu backend, from here on the cpu backend; the two round differently" in told
    assert "so far it was trained in bf16, from here on in fp32; the two round differently" in told
    assert "so far a batch was shared by 3 ranks, from here on by 1; the pictures and draws are the same" in told
    # An older version did not say in which precision and by how many ranks; there was one of each.
    header = {name: value for name, value in saved.header.items() if name not in ("precision", "ranks")}
    save_checkpoint(run / "train", 13, header, saved.arrays)
    # How far, how often and with how many threads changes no weight.
    free = ("checkpoint_every=3", "save_every=2", "validate_every=2", "log_every=9", "plateau_steps=1")
    free = settings(*(f"train.{setting}" for setting in free), "eval.batch_size=3", "loader.threads=2")
    told = train(run, "--resume", *nothing, *free).done().out
    assert "step-00000013.ckpt" in told
    assert "so far" not in told
    shutil.rmtree(run)


def test_memory_for_training_and_for_its_validation_is_asked_for(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []

    def ask(ops: ModuleType, layers: object, config: object, batch: int, *, training: bool) -> None:
        asked.append((batch, training))
        if len(asked) == 2:
            fail()

    monkeypatch.setattr(start_stage, "require_memory", ask)
    sizes = settings("train.batch_size=4", "eval.batch_size=500")  # there are 13 pictures to validate with
    restart_is_refused(begun, *sizes)
    assert asked == [(4, True), (13, False)]


def test_room_is_what_is_free_and_what_is_going_to_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, size = tmp_path / "train", 2_000_000  # of weights and momenta
    config = changes(settings=["train.keep_checkpoints=1"])(RECIPES["seed"])
    training = SimpleNamespace(run_dir=RunDir(tmp_path), config=config, shapes={"w": (1000, 250)})
    folder.mkdir()

    def told(free: int, saved: Path | None) -> str:
        monkeypatch.setattr(start_stage.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        try:
            start_stage._require_room(training, None if saved is None else SimpleNamespace(path=saved))
        except PipelineError as error:
            return str(error)
        return capsys.readouterr().out

    needs, in_time = "but a checkpoint needs 2 MB; free some space", "in time the checkpoints may need"
    assert needs in told(size - 1, None)
    # One is kept, one is the best, and one more is being written.
    assert in_time in told(size, None)
    assert in_time in told(3 * size - 1, None)
    assert told(3 * size, None) == ""
    paths = [folder / name for name in ("step-00000001.ckpt", "step-00000002.ckpt", "step-00000003.ckpt.tmp")]
    for path in paths:
        with open(path, "wb") as file:
            file.truncate(size)
    # Going on from the second, the first and the cut-off one will be removed; starting over, all is moved aside.
    assert told(0, paths[1]) == ""
    assert needs in told(size - 1, None)
    paths[2].unlink()
    assert in_time in told(size - 1, paths[1])
    assert told(size, paths[1]) == ""
    # What a crash left over before there was a checkpoint is removed too.
    for path in paths[:2]:
        path.rename(path.with_suffix(".ckpt.tmp"))
    assert in_time in told(0, None)
    assert told(size, None) == ""


def test_a_signal_in_the_last_step_finds_training_done(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = trainer.Trainer.step

    def and_signal(self: trainer.Trainer, batch: Any) -> None:
        step(self, batch)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.Trainer, "step", and_signal)
    assert run_pipeline.main(["--stage", "train", "--run", str(run), "--device", "reference", "--steps", "1"]) == 0
    out, err = capsys.readouterr()
    assert "trained to step 1" in out
    assert "go on with" not in err


def test_reading_ahead_begins_where_training_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the beginning it would give the same bytes, after reading again what the epoch has had."""
    noted, read_ahead = [], TrainingPlan.read_ahead
    monkeypatch.setattr(TrainingPlan, "read_ahead", lambda *given: noted.append(given[1:]) or read_ahead(*given))
    command = ["--stage", "train", "--run", str(run), "--device", "reference", "--resume", "--steps"]
    for steps in ("2", "1"):
        assert run_pipeline.main([*command, steps]) == 0
    assert noted == [(0, 2), (2, 3)]


@pytest.mark.parametrize("place", ["parameters", "momenta"])
def test_numbers_that_are_not_finite_are_never_saved(place: str, tmp_path: Path) -> None:
    """The loss of the step before may still be: it is what the weights were before this step."""
    sound = {"fc8.b": np.ones(5, np.float32)}
    state = State(3, dict(sound), dict(sound))
    getattr(state, place)["fc8.b"] = np.array([1, 2, np.inf, 4, 5], np.float32)
    log = SimpleNamespace(sync=lambda: None)
    with pytest.raises(PipelineError, match=r"fc8\.b is not finite at step 3: training has diverged; the last good"):
        train_stage.save(RunDir(tmp_path), reference, log, 3, state, {"validation": None})
    assert list((tmp_path / "train").iterdir()) == []
