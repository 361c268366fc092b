"""The command line's stages on the GPU backend: train, resume, evaluate; and checkpoints shared with the reference."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import run_pipeline
from pipeline.checkpoint import checkpoints, load_checkpoint
from pipeline.metrics import read_metrics
from stages import setup, start, trained
from tests.gpu import standin, test_network
from tests.gpu.conftest import REAL

SMALL = (
    *("preprocess.size=80", "input.crop=72", "network.fc_units=250"),
    *("train.batch_size=4", "eval.batch_size=40", "train.log_every=1"),
)


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's layers with few maps and units: it is the stages that are tried here."""
    original = setup.network_layers
    for stage in (setup, start, trained):
        monkeypatch.setattr(stage, "network_layers", lambda *a: test_network.small(original(*a)))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the preprocessed pictures of three classes in it."""
    root = tmp_path_factory.mktemp("gpu pipeline")
    random = np.random.default_rng(5)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("n01", "n02", "n03"):
            folder = root / "source" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture = random.integers(0, 256, (90, 100, 3)).astype(np.uint8)
                Image.fromarray(picture).save(folder / f"{name}_{number}.jpg")
    run = root / "run"
    settings = [part for setting in SMALL for part in ("--set", setting)]
    source = ["--source", str(root / "source"), "--recipe", "demo", "--jobs", "1"]
    assert run_pipeline.main(["--stage", "preprocess", "--run", str(run), *source, *settings]) == 0
    return run


def train(run: Path, *arguments: str) -> None:
    assert run_pipeline.main(["--stage", "train", "--run", str(run), *arguments]) == 0


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_checkpoint(max(checkpoints(run / "train"))).arrays


def test_training_resume_and_evaluation(
    backend: Callable[[str], ModuleType], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run in (whole, parts):
        shutil.copytree(shards, run)
    gpu = ("--device", "gpu", "--precision", "bf16")
    train(whole, *gpu, "--steps", "3", "--set", "train.log_every=2")
    assert [record["step"] for record in read_metrics(whole / "train" / "metrics.jsonl")] == [2, 3]
    said = capsys.readouterr().out
    assert "computing on the GPU in bf16" in said
    assert REAL or "(as asked): a pretended GPU, 80 GiB\n" in said
    train(parts, *gpu, "--steps", "2")
    train(parts, *gpu, "--steps", "1", "--resume")
    expected = weights(whole)
    for name, a in weights(parts).items():
        assert a.tobytes() == expected[name].tobytes(), name
    results, answers = {}, {}
    pictures = sorted(str(p) for p in (shards.parent / "source" / "val").rglob("*.jpg"))[:3]
    for device in ("gpu", "reference"):
        for views in ("1", "10"):
            command = ["--stage", "eval", "--run", str(whole), "--views", views, "--device", device]
            assert run_pipeline.main(command) == 0
            results[device, views] = json.loads((whole / "eval" / "metrics.json").read_text())
        capsys.readouterr()
        assert run_pipeline.main(["--stage", "predict", "--run", str(whole), "--device", device, *pictures]) == 0
        answers[device] = re.findall(r"n0\d\S*", capsys.readouterr().out)
    for views in ("1", "10"):
        ours, theirs = results["gpu", views], results["reference", views]
        assert ours["images"] == theirs["images"] == 6
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["top1"] == theirs["top1"]
    assert answers["gpu"] == answers["reference"]
    assert len(answers["gpu"]) >= 9
    # And the other way: the GPU goes on from a checkpoint of the reference.
    train(whole, "--device", "reference", "--steps", "1", "--resume")
    train(whole, *gpu, "--steps", "1", "--resume")
    assert all(np.isfinite(a).all() for a in weights(whole).values() if a.dtype == np.float32)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_report_and_the_export(
    backend: Callable[[str], ModuleType], shards: Path, tmp_path: Path, precision: str
) -> None:
    """The stages that follow: activations layer by layer, and another program's file checked against ours."""
    run, gpu = tmp_path / "run", ("--device", "gpu", "--precision", precision)
    shutil.copytree(shards, run)
    train(run, *gpu, "--steps", "2")
    for stage in ("eval", "report", "export"):
        assert run_pipeline.main(["--stage", stage, "--run", str(run), *gpu]) == 0
    assert (run / "report" / "index.html").exists()


@pytest.mark.parametrize(
    ("logged", "saved", "said"),
    [
        (4, 100, r"the loss is (nan|inf) at step 4: training has diverged"),
        (100, 4, r"is not finite at step 4: training"),
    ],
)
def test_divergence_is_seen_where_a_loss_is_logged_or_a_checkpoint_would_be_written(
    logged: int,
    saved: int,
    said: str,
    backend: Callable[[str], ModuleType],
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The losses before step 4 are never read; nothing that is not finite is kept all the same."""
    run = tmp_path / "run"
    shutil.copytree(shards, run)
    changed = ("train.lr=[[0,1e12]]", f"train.log_every={logged}", f"train.checkpoint_every={saved}")
    settings = [part for setting in changed for part in ("--set", setting)]
    assert run_pipeline.main(["--stage", "train", "--run", str(run), "--device", "gpu", "--steps", "9", *settings]) == 1
    assert re.search(said, capsys.readouterr().err)
    assert read_metrics(run / "train" / "metrics.jsonl") == []
    assert checkpoints(run / "train") == []


def test_a_batch_that_does_not_fit_is_refused_in_one_line(
    backend: Callable[[str], ModuleType], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if REAL:
        pytest.skip("a real GPU has memory for this")
    run = tmp_path / "run"
    shutil.copytree(shards, run)
    standin.machine.others = standin.machine.memory
    try:
        command = ["--stage", "train", "--run", str(run), "--device", "gpu", "--steps", "1"]
        assert run_pipeline.main(command) == 1
    finally:
        standin.machine.others = 0
    said = capsys.readouterr().err
    assert "needs about" in said
    assert said.count("\n") == 1
    assert not (run / "train" / "metrics.jsonl").exists()
