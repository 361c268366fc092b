"""Evaluation through the command line: every picture counts once, and the figures are those of the predictions."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

import net.cpu
from data.dataset import open_dataset
from net import network, reference
from net.alexnet import alexnet
from pipeline.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from pipeline.config_values import from_dict
from pipeline.run_dir import RunDir, read_sealed, write_sealed
from run_pipeline import main
from stages import eval as evaluation
from tests.command_line import pipeline, settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Path]:
    """Seven steps: checkpoints after 6 (the epoch, and so far the best) and 7."""
    run = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(prepared, run)
    pipeline("--stage", "train", "--run", run, "--steps", 7).done()
    yield run
    shutil.rmtree(run)


def evaluate(run: Path, *arguments: object) -> tuple[dict, dict[str, np.ndarray]]:
    pipeline("--stage", "eval", "--run", run, *arguments).done()
    with np.load(run / "eval" / "predictions.npz", allow_pickle=False) as file:
        return json.loads((run / "eval" / "metrics.json").read_text()), dict(file)


def stored_labels(run: Path) -> np.ndarray:
    labels = []
    for path in sorted((run / "preprocess").glob("val-*.h5")):
        with h5py.File(path) as file:
            labels.append(file["labels"][()])
    return np.concatenate(labels)


def check(run: Path, metrics: dict, predictions: dict[str, np.ndarray], views: int) -> None:
    """All figures follow from the predictions, computed here in the plainest way."""
    labels, top, loss = predictions["labels"], predictions["top"], predictions["loss"]
    assert np.array_equal(labels, stored_labels(run))
    assert metrics["images"] == len(labels) == len(top) == len(loss) == 13
    hits1 = [int(row[0] == label) for row, label in zip(top.tolist(), labels.tolist(), strict=True)]
    hits5 = [int(label in row[:5]) for row, label in zip(top.tolist(), labels.tolist(), strict=True)]
    assert metrics["top1"] == pytest.approx(sum(hits1) / 13, abs=1e-12)
    assert metrics["top5"] == pytest.approx(sum(hits5) / 13, abs=1e-12)
    assert metrics["loss"] == pytest.approx(sum(loss.tolist()) / 13, rel=1e-12)
    assert metrics["views"] == views
    assert metrics["images_per_second"] > 0
    for row in top:
        assert sorted(row.tolist()) == [0, 1, 2, 3, 4]
    p = predictions["probability"]
    assert np.all(np.diff(p, axis=1) <= 0)
    assert p.sum(axis=1) == pytest.approx(np.ones(13), rel=1e-5)
    own = p[np.arange(13), [row.index(label) for row, label in zip(top.tolist(), labels.tolist(), strict=True)]]
    assert loss == pytest.approx(-np.log(own.astype(np.float64)), rel=1e-12)
    with open(run / "eval" / "per_class.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table] == ["0", "1", "2", "3", "4"]
    assert [row["wnid"] for row in table] == [f"class{i}" for i in range(5)]
    for number, row in enumerate(table):
        mine = [hit for hit, label in zip(hits1, labels.tolist(), strict=True) if label == number]
        assert int(row["images"]) == len(mine) > 0
        assert float(row["top1"]) == pytest.approx(sum(mine) / len(mine), abs=1e-6)
    assert not list((run / "eval").glob("*.tmp"))


def test_centre_view_with_a_partial_last_batch(trained: Path) -> None:
    metrics, predictions = evaluate(trained)
    assert (metrics["checkpoint"], metrics["step"]) == ("step-00000007.ckpt", 7)
    check(trained, metrics, predictions, views=1)
    # A batch of another size, with another rest, changes nothing but the last bits.
    _, others = evaluate(trained, "--set", "eval.batch_size=5")
    assert np.array_equal(others["labels"], predictions["labels"])
    assert others["loss"] == pytest.approx(predictions["loss"], rel=1e-5)


def test_ten_views_average_the_softmax_and_batches_of_pictures_stay_together(trained: Path) -> None:
    one, centre = evaluate(trained, "--views", 1)
    metrics, predictions = evaluate(trained, "--views", 10)
    check(trained, metrics, predictions, views=10)
    assert metrics["loss"] != one["loss"]
    assert np.max(np.abs(predictions["probability"] - centre["probability"])) < 0.5
    # All of it in one piece gives the same.
    _, others = evaluate(trained, "--views", 10, "--set", "eval.batch_size=130")
    assert others["loss"] == pytest.approx(predictions["loss"], rel=1e-5)


def test_views_are_averaged() -> None:
    """The probabilities of a picture are the mean of its views', each as a picture of its own would have them."""
    layers = alexnet(7)
    shapes = network.parameter_shapes(layers, (67, 67, 3))
    parameters = network.initial_parameters(shapes, (0.0,) * 8, (0.1,) * 8, seed=1)
    prepared = network.Preparation(mean=None, scale=1 / 255, bgr=False, border=(0, 0))
    crops = np.random.default_rng(2).integers(0, 256, (6, 67, 67, 3), dtype=np.uint8)
    inputs = {"images": crops, "corner": np.zeros((6, 2), np.int32), "flip": np.zeros(6, np.uint8)}
    inputs["shift"] = np.zeros((6, 3), np.float32)
    each, three = (network.prediction(reference, layers, parameters, prepared, views)(inputs) for views in (1, 3))
    assert three.shape == (2, 7)
    np.testing.assert_allclose(three, each.reshape(2, 3, 7).mean(axis=1), rtol=1e-6)
    assert np.abs(three - each[::3]).max() > 1e-4


def test_ten_views_on_the_host_take_no_more_crops_at_a_time(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, upload = [], net.cpu.upload
    monkeypatch.setattr(net.cpu, "upload", lambda arrays: sizes.append(len(arrays["images"])) or upload(arrays))
    assert (
        main(
            [
                "--stage",
                "eval",
                "--run",
                str(trained),
                "--device",
                "cpu",
                "--views",
                "10",
                *settings("eval.batch_size=40"),
            ]
        )
        == 0
    )
    assert sizes == [40, 40, 40, 10]


def test_the_loader_has_as_many_threads_as_the_settings_say(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = evaluate(trained)
    threads, load = [], evaluation.load
    monkeypatch.setattr(
        evaluation, "load", lambda *given, **named: threads.append(named["threads"]) or load(*given, **named)
    )
    assert main(["--stage", "eval", "--run", str(trained), "--set", "loader.threads=3"]) == 0
    assert threads == [3]
    assert json.loads((trained / "eval" / "metrics.json").read_text())["loss"] == before["loss"]


@pytest.mark.parametrize("classes", [1, 3, 12, 1000])
def test_the_most_probable_classes_are_those_of_a_stable_sort(classes: int) -> None:
    random = np.random.default_rng(classes)
    for p in (random.integers(0, 4, (50, classes)) / 4, random.random((50, classes)), np.zeros((2, classes))):
        p = p.astype(np.float32)
        before = p.copy()
        assert np.array_equal(evaluation.most_probable(p), np.argsort(-p, axis=1, kind="stable")[:, :5])
        assert np.array_equal(p, before)


def test_a_batch_is_read_after_the_next_has_been_started(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    upload, to_host = net.cpu.upload, net.cpu.to_host
    monkeypatch.setattr(net.cpu, "upload", lambda arrays: events.append("start") or upload(arrays))
    monkeypatch.setattr(net.cpu, "to_host", lambda a: events.append("read") or to_host(a))
    command = ["--stage", "eval", "--run", str(trained), "--device", "cpu", "--set", "eval.batch_size=5"]
    assert main(command) == 0
    assert events == ["start", "start", "read", "start", "read", "read"]


def test_checkpoint_latest_best_and_by_name(trained: Path) -> None:
    best, _ = evaluate(trained, "--checkpoint", "best")
    assert best["step"] == 6
    named, _ = evaluate(trained, "--checkpoint", checkpoints(trained / "train")[0])
    assert (named["step"], named["loss"]) == (6, best["loss"])
    # Training validated the same checkpoint with the same figures.
    lines = [json.loads(line) for line in (trained / "train" / "metrics.jsonl").read_text().splitlines()]
    validation = next(line for line in lines if "validation_loss" in line)
    assert validation["validation_loss"] == best["loss"]
    assert (validation["top1"], validation["top5"]) == (best["top1"], best["top5"])


def test_an_output_that_is_not_finite_is_refused(
    trained: Path, small_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = load_checkpoint(checkpoints(trained / "train")[-1])
    saved.arrays["fc8.b"][0] = np.inf
    path = save_checkpoint(trained / "elsewhere", 7, saved.header, saved.arrays)
    picture = small_source / "val" / "class1" / "val1.png"
    for command in (["eval"], ["predict", str(picture)]):
        assert main(["--stage", *command, "--run", str(trained), "--checkpoint", str(path)]) == 1
        assert "the network's output is not finite; this checkpoint cannot be used" in capsys.readouterr().err
    shutil.rmtree(trained / "elsewhere")


def test_pictures_of_another_size_than_the_checkpoints_are_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = load_checkpoint(checkpoints(trained / "train")[-1])
    saved.header["config"]["preprocess"]["size"] = 90
    path = save_checkpoint(trained / "elsewhere", 7, saved.header, saved.arrays)
    assert main(["--stage", "eval", "--run", str(trained), "--checkpoint", str(path)]) == 1
    assert "have 72 pixels a side, but preprocess.size is 90" in capsys.readouterr().err
    shutil.rmtree(trained / "elsewhere")


def test_a_probability_of_0_has_a_finite_loss(prepared: Path) -> None:
    dataset, config = open_dataset(RunDir(prepared)), from_dict(read_sealed(prepared / "config.json", ""), "")

    def sure(inputs: dict[str, np.ndarray]) -> np.ndarray:
        return np.eye(5, dtype=np.float32)[[0] * len(inputs["images"])]

    result = evaluation.evaluate(reference, sure, dataset.val, config, 4, 1)
    assert result.top1 == np.mean(result.labels == 0)
    assert result.loss.tolist() == pytest.approx([0 if label == 0 else 87.3365 for label in result.labels])


def test_a_class_without_validation_pictures_has_no_rates(tmp_path: Path) -> None:
    top, one = np.array([[1, 0]], np.int32), np.ones(1, np.float32)
    result = evaluation.Evaluation(np.array([1], np.int32), top, one, one, 1.0)
    classes = [{"wnid": f"n{i}", "words": f"word {i}"} for i in range(2)]
    evaluation.write_results(tmp_path, SimpleNamespace(classes=classes), result, {})
    lines = (tmp_path / "per_class.csv").read_text().splitlines()
    assert lines[1:] == ["0,n0,word 0,0,,", "1,n1,word 1,1,1.000000,1.000000"]


def test_evaluation_changes_nothing_else(trained: Path) -> None:
    def state() -> dict[str, int]:
        return {
            str(path): path.stat().st_mtime_ns
            for folder in ("train", "preprocess")
            for path in sorted((trained / folder).iterdir())
        }

    before, config = state(), (trained / "config.json").read_bytes()
    evaluate(trained, "--set", "eval.batch_size=3")
    assert state() == before
    assert (trained / "config.json").read_bytes() == config


def test_views_are_the_checkpoints_unless_the_command_line_says_otherwise(
    trained: Path, small_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rule for evaluation and prediction; what is in config.json is for training to go on with."""
    picture = str(small_source / "val" / "class1" / "val1.png")

    def seen(*arguments: str) -> tuple[int, str]:
        """The views of an evaluation, and a prediction."""
        assert main(["--stage", "eval", "--run", str(trained), *arguments]) == 0
        capsys.readouterr()
        assert main(["--stage", "predict", "--json", picture, "--run", str(trained), *arguments]) == 0
        return json.loads((trained / "eval" / "metrics.json").read_text())["views"], capsys.readouterr().out

    one, ten = seen("--views", "1"), seen("--views", "10")
    assert one[1] != ten[1]
    config = (trained / "config.json").read_bytes()
    values = read_sealed(trained / "config.json", "")
    write_sealed(trained / "config.json", {**values, "eval": {**values["eval"], "views": 10}})
    assert seen() == one
    assert main(["--stage", "eval", "--run", str(trained), *settings("eval.views=10")]) == 0
    assert json.loads((trained / "eval" / "metrics.json").read_text())["views"] == 10
    (trained / "config.json").write_bytes(config)

    saved = load_checkpoint(checkpoints(trained / "train")[-1])
    saved.header["config"]["eval"]["views"] = 10
    save_checkpoint(trained / "elsewhere", 7, saved.header, saved.arrays)
    assert seen("--checkpoint", str(trained / "elsewhere" / "step-00000007.ckpt")) == ten
    shutil.rmtree(trained / "elsewhere")


def test_settings_of_the_network_that_eval_cannot_change_are_named(trained: Path) -> None:
    """The network is the checkpoint's; who asks for another one is told that nothing came of it."""
    said = pipeline(
        "--stage", "eval", "--run", trained, "--set", "network.lrn_k=1", "--set", "eval.batch_size=5"
    ).done()
    assert "checkpoint's own; not used: network.lrn_k (2.0 there, 1.0 here)\n" in said.out
    said = pipeline("--stage", "eval", "--run", trained, "--recipe", "caffe", "--seed", 3).done()
    assert "checkpoint's own; not used: --recipe caffe; seed (0 there, 3 here)\n" in said.out
    many = settings("network.lrn_k=1", "network.lrn_beta=1", "network.map_norm=true", "train.epochs=1", "seed=3")
    said = pipeline("--stage", "eval", "--run", trained, *many).done()
    assert "not used: seed (0 there, 3 here); network.lrn_k (2.0 there, 1.0 here); network.lrn_beta " in said.out
    assert "(0.75 there, 1.0 here); 2 other settings\n" in said.out
    said = pipeline("--stage", "eval", "--run", trained, "--set", "train.batch_size=2").done()
    assert "checkpoint's own; not used: train.batch_size (4 there, 2 here)\n" in said.out  # eval.batch_size was meant
    # A recipe's "auto", which training has settled, asks for nothing else than the checkpoint has.
    used = settings("eval.batch_size=5", "train.order=auto")
    assert "not used" not in pipeline("--stage", "eval", "--run", trained, *used).done().out


def test_of_five_classes_or_fewer_the_first_five_are_not_told(trained: Path) -> None:
    """They are all classes; files have the figure, as scripts expect it."""
    said = pipeline("--stage", "eval", "--run", trained).done().out
    assert re.search(r": top-1 \d+\.\d+%, loss ", said), said
    assert json.loads((trained / "eval" / "metrics.json").read_text())["top5"] == 1
    right = np.zeros(4, np.int32)
    result = evaluation.Evaluation(right, np.array([[1, 2, 3, 4, 0]] * 4), np.zeros((4, 5)), np.zeros(4), 1.0)
    assert evaluation.accuracy(result, classes=5) == "top-1 0.00%"
    assert evaluation.accuracy(result, classes=6) == "top-1 0.00%, top-5 100.00%"
