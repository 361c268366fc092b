"""The evidence in small: a run by hand and one by PyTorch through all stages, taken up again, and the tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import run_pipeline
from bench import evidence
from pipeline.config import CAFFE, ORIGINAL
from pipeline.metrics import read_metrics
from tests.command_line import QUICK, settings
from tests.net.test_weights import needed


class InThisProcess:
    """Stands for ``evidence.Children``: the same command lines without the seconds that processes take to start."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def run(self, arguments: Sequence[str], log: Path) -> int:
        self.commands.append(list(arguments))
        if arguments[0] == "run_pipeline.py":
            return run_pipeline.main(list(arguments[1:]))
        from bench import evidence_torch

        assert arguments[:2] == ["-m", "bench.evidence_torch"]
        return evidence_torch.main(list(arguments[2:]))


def test_by_hand_and_by_pytorch_through_all_stages(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed("torch")
    started: list[InThisProcess] = []
    monkeypatch.setattr(evidence, "Children", lambda: started.append(InThisProcess()) or started[-1])
    rates = "train.lr=[[0,0.004],[3,0.001]]"
    changed = settings(*[value for value in QUICK if not value.startswith("train.")], rates)
    # The demo recipe's start makes losses that tell one order of pictures, or one set of masks, from another.
    options = ["--out", str(tmp_path), "--base", "demo", "--epochs", "2", "--batch", "4", "--seeds", "3", *changed]
    names = ["--only", "demo", "demo in PyTorch"]
    assert evidence.main(["--source", str(small_source), *options, *names]) == 0

    written = json.loads((tmp_path / "evidence.json").read_text())
    hand, torch = written["runs"]
    assert (hand["name"], hand["by"], torch["by"]) == ("demo", "hand", "PyTorch")
    for r in (hand, torch):
        assert [epoch for epoch, *_ in r["validation"]] == [1, 2]
        assert r["centre"]["images"] == r["ten_views"]["images"] == 13
    # The same start, pictures, draws, masks and schedule: only rounding tells the two apart.
    assert len(hand["training"]) == 2
    np.testing.assert_allclose(hand["training"], torch["training"], rtol=1e-3)
    assert hand["centre"]["loss"] == pytest.approx(torch["centre"]["loss"], rel=1e-3)
    assert torch["centre"]["loss"] == pytest.approx(torch["validation"][-1][3], rel=1e-4)  # eval's forward, PyTorch's
    folder = tmp_path / "demo-in-pytorch-seed3-2x4"
    rates = {r["epoch"]: r["lr"] for r in read_metrics(folder / "train" / "metrics.jsonl") if "lr" in r}
    assert rates == {0: 0.004, 1: 0.004}  # epoch 3 of 4 is past the second of two
    assert not list(tmp_path.glob("*/train/*.ckpt"))
    assert (folder / "report" / "index.html").exists()
    with Image.open(tmp_path / "evidence.png") as image:
        assert image.width > 1000
    table = (tmp_path / "evidence.md").read_text()
    assert "| demo in PyTorch | 2 of 2 |" in table

    # Done runs are not done again; one whose result is gone goes on from its metrics.
    assert evidence.main([*options, *names]) == 0
    assert started[-1].commands == []


def test_plan_and_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    runs = evidence.planned("original", [0, 1])
    assert len({(run.name, run.seed) for run in runs}) == len(runs) == 2 * 11
    for run in runs:  # every change is one the configuration takes
        config = evidence.configured(run, 20, 128)
        assert (config.train.epochs, config.train.batch_size, config.seed) == (20, 128, run.seed)
    assert evidence.scaled(ORIGINAL.train.lr, 20 / 91) == ((0, 0.01), (6, 0.001), (12, 0.0001), (18, 0.00001))
    assert evidence.scaled(CAFFE.train.lr, 1 / 72) == ((0, 0.01), (1, 0.00001))
    assert evidence.configured(runs[0], 20, 128).input.jitter_epochs == 15
    assert evidence.main(["--list", "--only", "paper"]) == 0
    assert capsys.readouterr().out == "left  seed 0  paper\nleft  seed 1  paper\n"


def test_a_plateau_is_measured() -> None:
    flat = [(0.1 * step, 2.3) for step in range(40)]
    falling = [(4 + 0.1 * step, 2.3 - 0.02 * step) for step in range(20)]
    assert evidence.leaves_chance(flat, 10) is None
    assert evidence.leaves_chance(flat + falling, 10) == pytest.approx(4.3, abs=0.11)
    assert evidence.leaves_chance([(0.0, float("nan"))] * 9, 10) is None


def test_tables_put_seeds_and_ablations_beside_each_other() -> None:
    def made(name: str, seed: int, centre: float, ten: float) -> dict:
        both = {"centre": {"top1": centre, "top5": 1, "loss": 1}, "ten_views": {"top1": ten, "top5": 1, "loss": 1}}
        run = {"name": name, "seed": seed, "classes": 10, "epochs": 2, "batch": 8, "validation": [[2, centre, 1, 1]]}
        rest = {"images_per_second": 9.0, "leaves_chance_after": None, "machine": "m", "date": "d"}
        return {**run, **rest, **both}

    results = [made("x", 0, 0.70, 0.72), made("x", 1, 0.72, 0.74), made("x without flips", 0, 0.66, 0.70)]
    results.append({**made("y", 0, 0, 0), "failed": "diverged at step 3"})
    del results[-1]["centre"], results[-1]["ten_views"]
    table = evidence.markdown(results, "x")
    assert "| x | 2 of 2 | 70.0 / 72.0 | 72.0 / 74.0 | 100.0 / 100.0 | 1.000 / 1.000 | never / never | 9.0 |" in table
    assert "| flips | +5.0 | +3.0 |" in table
    assert "- y, seed 0: diverged at step 3" in table
    assert "| y | 2 of 2 | failed | failed |" in table
    assert evidence.markdown([], "x")
