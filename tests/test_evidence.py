"""The evidence in small: a run by hand and one by PyTorch through all stages, taken up again, and the tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import run_pipeline
from bench import evidence, evidence_plan, evidence_tables
from net.reference.dropout import dropout_mask as reference_mask
from pipeline.config import CAFFE, ORIGINAL
from pipeline.metrics import read_metrics
from tests.command_line import QUICK, settings
from tests.net.test_weights import needed


class OneAfterAnother(Executor):
    """Stands for the pool of threads: does each task when it is submitted."""

    def __init__(self, jobs: int) -> None:
        assert jobs == 1

    def submit(self, task: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        future.set_result(task())
        return future


class InThisProcess:
    """Stands for ``evidence.Children``: the same command lines without the seconds that processes take to start."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.commands: list[list[str]] = []
        self.environment = environment

    def check(self) -> None:
        pass

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
    # One thread after another, in this one: signal handlers cannot be set elsewhere.
    monkeypatch.setattr(evidence, "ThreadPoolExecutor", OneAfterAnother)
    monkeypatch.setattr(evidence, "Children", lambda given: started.append(InThisProcess(given)) or started[-1])
    rates = "train.lr=[[0,0.001],[3,0.0001]]"
    changed = settings(*[value for value in QUICK if not value.startswith("train.")], rates)
    # The demo recipe's start makes losses that tell one order of pictures, or one set of masks, from another.
    options = ["--out", str(tmp_path), "--base", "demo", "--epochs", "2", "--batch", "4", "--seeds", "3", *changed]
    options += ["--device", "cpu", "--report", "demo"]
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
    assert rates == {0: 0.001, 1: 0.001}  # epoch 3 of 4 is past the second of two
    assert not list(tmp_path.glob("*/train/*.ckpt"))
    assert (tmp_path / "demo-seed3-2x4" / "report" / "index.html").exists()
    assert not (folder / "report").exists()
    with Image.open(tmp_path / "evidence.png") as image:
        assert image.width > 1000
    table = (tmp_path / "evidence.md").read_text()
    assert "| demo in PyTorch | 2 of 2 |" in table

    # Done runs are not done again; one whose result is gone goes on from its metrics.
    assert evidence.main([*options, *names]) == 0
    assert started[-1].commands == []


def test_plan_and_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    runs = evidence_plan.planned("original", [0, 1])
    assert len({(run.name, run.seed) for run in runs}) == len(runs) == 2 * 11
    for run in runs:  # every change is one the configuration takes
        config = evidence_plan.configured(run, evidence_plan.How(20, 128))
        assert (config.train.epochs, config.train.batch_size, config.seed) == (20, 128, run.seed)
    assert evidence_plan.scaled(ORIGINAL.train.lr, 20 / 91) == ((0, 0.01), (6, 0.001), (12, 0.0001), (18, 0.00001))
    assert evidence_plan.scaled(CAFFE.train.lr, 1 / 72) == ((0, 0.01), (1, 0.00001))
    assert runs[0].name == "original"
    assert evidence_plan.configured(runs[0], evidence_plan.How(20, 128)).input.jitter_epochs == 15
    rarely = evidence_plan.How(20, 128, ("train.validate_every=5", "train.save_every=20"))
    assert evidence_plan.configured(runs[0], rarely).train.validate_every == 5
    half = evidence_plan.How(20, 128, precision="bf16")
    assert evidence_plan.folder_of(Path("x"), runs[0], half).root == Path("x/original-seed0-20x128-bf16")
    assert evidence_plan.folder_of(Path("x"), runs[0], evidence_plan.How(20, 128)).root == Path(
        "x/original-seed0-20x128"
    )
    assert evidence.main(["--list", "--only", "paper"]) == 0
    assert capsys.readouterr().out == "left  seed 0  paper\nleft  seed 1  paper\n"


class Script(NamedTuple):
    """A child that is told to stop: notes that it runs, and ends with 143 as a stage does that has saved."""

    path: Path

    def write(self) -> None:
        self.path.write_text(
            "import pathlib, signal, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
            "pathlib.Path(sys.argv[1]).touch()\n"
            "time.sleep(0 if sys.argv[2] == 'short' else 60)\n"
        )


def test_several_at_a_time_and_an_end_of_time(tmp_path: Path) -> None:
    script = Script(tmp_path / "child.py")
    script.write()
    children, done = evidence.Children({"EVIDENCE": "1"}), []

    def task(name: str, length: str) -> Callable[[], None]:
        def carry() -> None:
            assert children.run([str(script.path), str(tmp_path / name), length], tmp_path / f"{name}.log") == 0
            done.append(name)

        return carry

    signals = SimpleNamespace(number=0)
    calls: list[int] = []

    def finished() -> None:
        calls.append(len(done))

    first = [task("a", "short"), task("b", "short")]
    assert evidence.carry_out_all(children, signals, first, 2, time.monotonic() + 60, finished)
    assert sorted(done) == ["a", "b"]
    assert calls[-1] == 2
    # Two long ones begin, are stopped at the deadline, and the third is never started.
    began = time.monotonic()
    second = [task("c", "long"), task("d", "long"), task("e", "short")]
    assert not evidence.carry_out_all(children, signals, second, 2, began + 3, finished)
    assert time.monotonic() - began < 30
    assert sorted(done) == ["a", "b"]
    assert (tmp_path / "c").exists()
    assert not (tmp_path / "e").exists()


def test_what_goes_wrong_in_a_task_ends_the_others(tmp_path: Path) -> None:
    script = Script(tmp_path / "child.py")
    script.write()
    children = evidence.Children({})

    def broken() -> None:
        while not (tmp_path / "long").exists():
            time.sleep(0.01)
        raise RuntimeError("broken")

    def long() -> None:
        children.run([str(script.path), str(tmp_path / "long"), "long"], tmp_path / "log")

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="broken"):
        evidence.carry_out_all(children, SimpleNamespace(number=0), [long, broken], 2, began + 60, lambda: None)
    assert time.monotonic() - began < 30


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in evidence.THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the user's own word counts
    monkeypatch.setattr(evidence.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert evidence.few_threads(1) == {}
    assert evidence.few_threads(5) == dict.fromkeys(evidence.THREADS[1:], "3")
    assert evidence.few_threads(40) == dict.fromkeys(evidence.THREADS[1:], "1")


def test_pytorch_draws_our_dropout_masks() -> None:
    needed("torch")
    from bench.evidence_torch import dropout_mask

    for shape, seed, step in [((3, 5), 0, 0), ((2, 7), 2**40 + 3, 2**33 + 11), ((128, 33), 1, 4229)]:
        ours = reference_mask(shape, 0.5, (seed, step, 6))
        np.testing.assert_array_equal(dropout_mask(shape, 0.5, seed, step, 6, "cpu").numpy(), ours)
        assert not np.array_equal(dropout_mask(shape, 0.5, seed, step, 7, "cpu").numpy(), ours)


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
        rest |= {"training": [[1.5, 2.0]], "precision": "bf16", "jobs": 5}
        rest["leaves_chance_after"] = 1.0 if centre > 0.1 else None
        return {**run, **rest, **both}

    results = [made("x", 0, 0.70, 0.72), made("x", 1, 0.72, 0.74), made("x without flips", 0, 0.66, 0.70)]
    results.append({**made("x without dropout", 0, 0, 0), "failed": "nan"})
    del results[-1]["centre"], results[-1]["ten_views"]
    results.append(made("x without dropout", 1, 0.1, 0.1))
    results.append({**made("y", 0, 0, 0), "failed": "diverged at step 3"})
    del results[-1]["centre"], results[-1]["ten_views"]
    results.append({**made("z", 0, 0, 0), "validation": []})
    del results[-1]["centre"], results[-1]["ten_views"]
    table = evidence_tables.markdown(results, "x")
    assert "| z | 1.5 of 2 | unfinished | unfinished | unfinished | unfinished | not yet | 9 |" in table
    assert "Machine: m; d; bf16, batch 8; 5 runs at a time shared it, so no rate is the machine's." in table
    assert (
        "| x | 2 of 2 | 70.0 / 72.0 | 72.0 / 74.0 | 100.0 / 100.0 | 1.000 / 1.000 | 1.0 epochs / 1.0 epochs |" in table
    )
    assert "| flips | +4.0 | +2.0 |" in table  # beside the same seed
    assert "| dropout | failed / at chance | failed / at chance |" in table  # no figure, so no cost
    assert "- y, seed 0: diverged at step 3" in table
    assert "| y | 2 of 2 | failed | failed |" in table
    assert evidence_tables.markdown([], "x")


def test_training_curves_are_compared_seed_by_seed() -> None:
    def made(name: str, seed: int, above: float, later: float) -> dict:
        losses = [[0.1 * n, 2.0 + above + (-1) ** n + (later if n >= 100 else 0)] for n in range(120)]
        return {"name": name, "seed": seed, "training": losses}

    hand, torch = made("x", 0, 0.0, 0.25), made("x in PyTorch", 0, 0.125, 0.0)
    assert evidence_tables.apart(hand["training"], torch["training"], 1, 500) == pytest.approx((-0.125, 0.125, 0.125))
    # No point reaches across the border, and the noise that both share is not in the difference.
    assert evidence_tables.apart(hand["training"], torch["training"], 501, 600) == pytest.approx((0.125, 0.125, 0.125))
    assert evidence_tables.apart(hand["training"][:99], torch["training"], 501, 600) is None
    groups = {"x": [hand, made("x", 1, 0.5, 0.25)], "x in PyTorch": [torch]}
    assert evidence_tables._curves(groups, "x")[2:] == [
        "| curves | steps 1 to 500 | steps 501 to 600 |",
        "|---|---|---|",
        "| by hand - PyTorch, seed 0 | -0.125, 0.125, 0.125 | +0.125, 0.125, 0.125 |",
        "| seed 0 - seed 1, by hand | -0.500, 0.500, 0.500 | -0.500, 0.500, 0.500 |",
        "",
    ]
    assert evidence_tables._curves({"x": [hand]}, "x") == []
