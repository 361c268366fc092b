"""The measuring commands as far as they go without a GPU (``python -m bench.gpu --dry-run`` runs them whole)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import gpu, gpu_checks, gpu_convolution
from net.alexnet import alexnet
from tests.gpu import test_network
from tests.gpu.conftest import REAL, need_compiler


@pytest.fixture
def in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few maps and units, and nobody beside us: PyTorch's network has AlexNet's own sizes."""
    if REAL:
        pytest.skip("python -m bench.gpu measures on a GPU")
    need_compiler()
    for module in (gpu, gpu_checks):
        monkeypatch.setattr(module, "alexnet", lambda *a, **k: test_network.small(alexnet(*a, **k)))
    monkeypatch.setattr(gpu, "torch_contenders", lambda *a: [])


def test_the_dry_run_goes_through_everything(
    in_small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.main(["--dry-run", "--precision", "bf16", "--json", str(tmp_path / "figures.json")])
    said = capsys.readouterr().out
    for words in (
        "resumed after 2 of 4 steps: the same bits",
        "together   97 kernels",
        "fed by 2 loader threads",
        "training step, bf16, batch 2",
        "10-view evaluation, bf16, batch 10",
        "--stage train --run RUN",
        "compute-sanitizer --tool racecheck",
    ):
        assert words in said
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [f["contender"] for f in written["figures"]] == ["ours", "ours"]
    assert len(written["kernels bf16 2"]) == 97
    assert len(written["curve bf16"]["ours"]) == 2


def test_a_resume_that_loses_the_momenta_is_seen(in_small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gpu_checks.training

    def forgetful(ops: ModuleType, host: Any, classes: int, keep: float, momenta: Any = None) -> Any:
        return original(ops, host, classes, keep)

    monkeypatch.setattr(gpu_checks, "training", forgetful)
    with pytest.raises(SystemExit, match="resuming gives other bits"):
        gpu.main(["--dry-run", "--precision", "fp32"])


def figure(contender: str, milliseconds: float) -> gpu.Figure:
    return gpu.Figure("training step", contender, "bf16", 128, 128e3 / milliseconds, milliseconds, 0.0, 1.0)


def test_the_best_mode_of_pytorch_is_compared_with() -> None:
    figures = [figure("ours", 4.0), figure("PyTorch eager", 9.0), figure("PyTorch compile", 5.0)]
    assert gpu.ratio_to_best(figures) == pytest.approx(1.25)
    assert gpu.ratio_to_best(figures[:1]) is None
    assert "| 32,000 | 25,600 | compile | 1.25 | 1.2 |" in gpu.summary(figures)
    assert "90 epochs of ILSVRC at this rate: 60 minutes" in "\n".join(gpu.report(figures))


def test_contenders_that_disagree_are_seen() -> None:
    same = [figure("ours", 1.0), figure("PyTorch eager", 1.0)]
    assert "agree" in gpu.report_dry(same, 1e-3)[0]
    other = gpu.Figure("training step", "PyTorch eager", "bf16", 128, 1.0, 1.0, 0.0, 1.1)
    with pytest.raises(SystemExit, match="do not compute the same"):
        gpu.report_dry([same[0], other], 1e-3)


def test_a_slow_contender_gets_fewer_steps_and_a_failing_one_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    calls: dict[str, int] = {"quick": 0, "broken": 0}

    def start(name: str) -> Callable[[], Callable[[gpu.Host], Any]]:
        def step(batch: gpu.Host) -> np.ndarray:
            calls[name] += 1
            if name == "broken":
                raise RuntimeError("no such kernel")
            return np.ones(2)

        return lambda: step

    runners = [gpu.Contender(name, start(name), np.asarray, lambda: None) for name in calls]
    effort = gpu.Effort(rounds=3, window=5, seconds=1e9, deadline=float("inf"))
    figures = gpu.race("training step", runners, "fp32", [{}] * 4, 8, effort)
    assert [f.contender for f in figures] == ["quick"]
    assert calls == {"quick": 5 + 3 * 5, "broken": 1}
    assert "broken does not run: no such kernel" in capsys.readouterr().out
    calls["quick"] = 0
    gpu.race("training step", runners[:1], "fp32", [{}] * 4, 8, gpu.Effort(3, 5, 0.0, float("inf")))
    assert calls["quick"] == 5 + 3
    assert gpu.race("training step", runners, "fp32", [{}] * 4, 8, gpu.Effort(3, 5, 1.0, 0.0)) == []
    assert "the time is up" in capsys.readouterr().out


def test_without_compute_sanitizer_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="not on the PATH"):
        gpu.main(["--sanitize"])


@pytest.mark.parametrize(
    ("name", "card"),
    [("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA GeForce RTX 4090", "RTX 4090")],
)
def test_the_models_card_is_found_by_the_drivers_name_and_built_like_the_device(name: str, card: str) -> None:
    for said, meant in ((name, card), ("some other card", "H100 SXM")):
        found = gpu_checks._card(SimpleNamespace(name=said, processors=20, shared_processor=65536, memory=2**33))
        assert (found.name, found.processors, found.shared_processor, found.memory) == (meant, 20, 65536, 2**33)


def test_the_convolutions_are_compared(
    backend: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In small: every layer and pass both ways, and how far apart they are."""
    if REAL:
        pytest.skip("python -m bench.gpu_convolution measures on a GPU")
    monkeypatch.setattr(gpu_convolution, "SIDE", 67)
    monkeypatch.setattr(gpu_convolution, "_with_torch", lambda layer, ops: lambda name, rounds: "-")
    monkeypatch.setattr(gpu_convolution, "load", lambda device, precision: backend(precision))
    gpu_convolution.main(["--batch", "8", "--rounds", "1"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("conv")]
    assert [tuple(row[:2]) for row in rows] == [
        (f"conv{number}", name) for number in range(1, 6) for name in ("y", "dw", "dx") if (number, name) != (1, "dx")
    ]
    for row in rows:
        assert float(row[-1]) < 5e-3, row
