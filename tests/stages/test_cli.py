"""The command line as a whole: exit statuses, usage, where the configuration comes from, all stages in one go."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import run_pipeline
from data.shards import open_split
from pipeline.checkpoint import checkpoints
from pipeline.run_dir import read_sealed
from tests.command_line import QUICK, finish, pipeline, settings, start, wait_until


def usage(*arguments: object) -> str:
    """What a wrong command line is told; it touches nothing."""
    result = pipeline(*arguments)
    assert result.status == 2, result
    assert "Traceback" not in result.err
    return result.err


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Path]:
    """A folder ``train`` with the checkpoint of one step."""
    run = tmp_path_factory.mktemp("once") / "run"
    shutil.copytree(prepared, run)
    pipeline("--stage", "train", "--run", run, "--steps", 1).done()
    yield run / "train"
    shutil.rmtree(run)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--stage", "evaluate"], "invalid choice: 'evaluate'"),
        (["--stage", "train", "--stpes", "3"], "unrecognized arguments: --stpes"),
        (["--stage", "train", "--steps", "0"], "argument --steps: takes a whole number of at least 1, not '0'"),
        (["--stage", "train", "--steps", "many"], "argument --steps: takes a whole number of at least 1, not 'many'"),
        (["--stage", "train", "--steps", "1", "--epochs", "1"], "--steps"),
        (["--stage", "train", "--resume", "--restart"], "not allowed with argument --resume"),
        (["--stage", "eval", "--views", "5"], "argument --views: invalid choice: 5"),
        (["--stage", "train", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--stage", "train", "--seed", "x"], "argument --seed: invalid int value"),
    ],
)
def test_wrong_usage_is_status_2(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run_pipeline.main(arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_of_the_real_process() -> None:
    assert "invalid choice" in usage("--stage", "evaluate")
    help_text = pipeline("--help").done().out
    for stage in ("preprocess", "train", "eval", "verify"):
        assert stage in help_text


def test_wrong_settings_are_plain_and_touch_nothing(tmp_path: Path, small_source: Path) -> None:
    run = tmp_path / "run"
    common = ("--stage", "preprocess", "--source", small_source, "--run", run)
    pipeline(*common, "--recipe", "orignal").refused(r"there is no recipe 'orignal' \(did you mean original\?\)")
    pipeline(*common, "--set", "train.batchsize=3").refused(r"did you mean train\.batch_size\?")
    pipeline(*common, "--config", tmp_path / "none.toml").refused(r"cannot read the configuration file .*none\.toml")
    assert not run.exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = pipeline("--stage", "train", "--run", tmp_path, "--debug")
    assert result.status == 1
    assert "Traceback" in result.err
    assert "PipelineError" in result.err


def test_the_configuration_is_resolved_written_and_used_again(tmp_path: Path, small_source: Path) -> None:
    run, toml = tmp_path / "run", tmp_path / "mine.toml"
    toml.write_text("seed = 4\n[train]\nmomentum = 0.5\nlog_every = 7\n")
    pipeline(
        *("--stage", "preprocess", "--source", small_source, "--run", run, "--jobs", 1),
        *("--recipe", "caffe", "--config", toml, "--seed", 9, *settings(*QUICK)),
    ).done()
    config = read_sealed(run / "config.json", "")
    assert config["recipe"] == "caffe"
    assert config["seed"] == 9
    assert config["train"]["momentum"] == 0.5
    assert config["train"]["log_every"] == 1  # --set comes after --config
    assert config["network"]["bias"][1] == 0.1
    pipeline("--stage", "train", "--run", run, "--steps", 1, "--set", "train.weight_decay=0.25").done()
    changed = read_sealed(run / "config.json", "")
    assert changed["train"].pop("weight_decay") == 0.25
    config["train"].pop("weight_decay")
    assert config["train"].pop("order") == "auto"
    assert changed["train"].pop("order") == "uniform"  # settled by the first training, for all that follow
    assert changed == config


def test_all_stages_in_one_go_on_the_demo_set(tmp_path: Path) -> None:
    """No flag but the run directory and what makes it quick: the built-in set is drawn, trained on and evaluated."""
    run = tmp_path / "run"
    changes = (
        "preprocess.shard_images=200",
        "train.epochs=1",
        "train.batch_size=480",
        "train.checkpoint_every=100",
        "eval.batch_size=240",
    )
    result = pipeline("--run", run, *settings(*QUICK[:4], *changes)).done()
    assert "built-in demo set is drawn" in result.out
    assert "All stages are done" in result.out
    for name in ("preprocess/manifest.json", "train/latest.json", "eval/metrics.json", "eval/per_class.csv"):
        assert (run / name).is_file()
        assert name.partition("/")[0] in result.out
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    assert metrics["images"] == 240
    rejects = [json.loads(line) for line in (run / "preprocess" / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 1
    assert not list(run.rglob("*.tmp*"))
    # Once more: there are checkpoints, and both ways on are named.
    pipeline("--run", run).refused(r"add --resume .*--restart")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_while_evaluating_leave_the_earlier_evaluation(
    run: Path, number: signal.Signals, status: int, trained_once: Path
) -> None:
    folder = run / "eval"
    folder.mkdir()
    (folder / "metrics.json").write_text("before")
    (run / "train").symlink_to(trained_once)
    process = start("--stage", "eval", "--run", run, "--views", 10, "--device", "reference")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("computing on the reference")
    process.send_signal(number)
    result = finish(process)
    assert result.status == status, result
    assert "everything finished so far is kept" in result.err
    assert "Traceback" not in result.err
    assert (folder / "metrics.json").read_text() == "before"
    assert [path.name for path in folder.iterdir()] == ["metrics.json"]


def test_sigint_while_training_saves_and_is_status_130(run: Path) -> None:
    process = start("--stage", "train", "--run", run, "--steps", 1000)
    wait_until(
        lambda: (run / "train" / "metrics.jsonl").exists() and (run / "train" / "metrics.jsonl").stat().st_size > 0,
        process,
    )
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert result.status == 130, result
    assert "everything is saved; go on with" in result.err
    assert len(checkpoints(run / "train")) >= 1


def test_ilsvrc_mini_by_the_official_archives(tmp_path: Path, ilsvrc_mini: Path, shared_data: Path) -> None:
    """Real archives through all three stages; every picture is accounted for and labels agree with the reference."""
    run = tmp_path / "run"
    pipeline(
        *("--stage", "preprocess", "--source", ilsvrc_mini, "--run", run, "--recipe", "original"),
        *settings(*QUICK, "preprocess.shard_images=200", "eval.batch_size=100"),
    ).done()
    pipeline("--stage", "train", "--run", run, "--steps", 2).done()
    pipeline("--stage", "eval", "--run", run, "--views", 1).done()
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    assert metrics["images"] == 500
    manifest = read_sealed(run / "preprocess" / "manifest.json", "")
    counts = {split: (part["images"], part["rejects"]) for split, part in manifest["splits"].items()}
    assert counts == {"train": (611, 0), "val": (500, 0)}
    reference = dict(line.split() for line in (shared_data / "reference" / "val.txt").read_text().splitlines())
    split = open_split(run / "preprocess", manifest, "val")
    for name, label in zip(split.sources().tolist(), split.labels.tolist(), strict=True):
        assert int(reference[name.decode()]) == label
    with np.load(run / "eval" / "predictions.npz", allow_pickle=False) as predictions:
        assert np.array_equal(predictions["labels"], split.labels)
        assert predictions["top"].shape == (500, 5)
