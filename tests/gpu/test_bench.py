"""The measuring commands as far as they go without a GPU (``python -m bench.gpu --dry-run`` runs them whole)."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import gpu, gpu_checks, gpu_convolution
from net.alexnet import alexnet
from net.backend import BackendUnavailableError
from net.gpu import convolution, implicit
from net.gpu.arrays import pictures
from net.gpu.shape import ConvShape
from tests.gpu import test_network
from tests.gpu.conftest import REAL, need_compiler

ROOT = Path(__file__).parents[2]


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
        "compute-sanitizer --tool racecheck",
    ):
        assert words in said
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [f["contender"] for f in written["figures"]] == ["ours", "ours"]
    assert len(written["kernels bf16 2"]) == 97
    assert len(written["curve bf16"]["ours"]) == 2


def test_a_resume_that_loses_the_momenta_is_seen_and_the_rest_measured(
    in_small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = gpu_checks.training

    def forgetful(ops: ModuleType, host: Any, classes: int, keep: float, momenta: Any = None) -> Any:
        return original(ops, host, classes, keep)

    monkeypatch.setattr(gpu_checks, "training", forgetful)
    with pytest.raises(SystemExit, match="not so: resumed to the same bits fp32"):
        gpu.main(["--dry-run", "--precision", "fp32", "--json", str(tmp_path / "figures.json")])
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["resumed to the same bits fp32"] is False
    assert {"kernels fp32 2", "fed by the loader fp32 2"} <= set(written)


def test_what_has_been_measured_is_written_before_the_next_part(
    in_small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The clock of a lent card may stop the command at any time."""

    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_checks, "kernel_times", stopped)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--dry-run", "--precision", "fp32", "--json", str(tmp_path / "figures.json")])
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["resumed to the same bits fp32"] is True
    assert "curve fp32" in written


def test_a_folder_that_is_not_there_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parsed(["--json", str(tmp_path / "none" / "figures.json")])
    assert "there is no folder" in capsys.readouterr().err


def test_the_checkers_end_within_the_pages_command() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    (seconds,) = re.findall(r"timeout (\d+) python -m bench.gpu --sanitize", page)
    assert int(seconds) - 20 > 3 * gpu_checks.SANITIZER_SECONDS


LENT = ("h5py", "hypothesis", "joblib", "jinja2", "matplotlib", "numba", "PIL", "safetensors", "scipy", "tqdm", "xdist")


def test_a_lent_machine_can_collect_the_tests() -> None:
    """Line 1 of docs/gpu.md, "When you have a card": NumPy, CuPy and pytest are all that such a machine has."""
    code = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def without(cls, name, path=None, target=None):
    return None if name.split(".")[0] in {LENT} else find(name, path, target)
PathFinder.find_spec = classmethod(without)
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"]))
"""
    # Installed plugins are found by their metadata, and would not load without their modules.
    environment = os.environ | {"ALEXNET_TEST_GPU": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_operations.py" in done.stdout
    assert not any(file in done.stdout for file in ("test_pipeline.py", "test_shim.py", "test_cubins.py"))


def test_without_a_card_it_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: str, precision: str) -> None:
        raise BackendUnavailableError("no card")

    for module in (gpu, gpu_convolution):
        monkeypatch.setattr(module, "load", fail)
        with pytest.raises(SystemExit, match="no card"):
            module.main([])


def test_a_container_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "card" not in gpu.machine(dry=False)


def test_tiles_that_a_card_has_no_shared_memory_for_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """On a consumers' card `--tune` would end at the first of them."""
    card = SimpleNamespace(processors=128, shared_processor=100 * 1024)
    conv2 = ConvShape(128, 27, 27, 96, 5, 5, 256, 1, 2, 2)

    def timed(run: Callable[[], Any]) -> float:
        plan = run()
        assert plan.shared <= 99 * 1024
        return 1.0

    gpu_convolution._tune(lambda: implicit.product_plan(implicit.backwards(conv2), 27 * 27, card), "dx", timed)
    told = capsys.readouterr().out.split("  ")
    assert "128x2 1.0" in told
    assert "128x3 too large" in told
    assert "48x3 1.0" in told


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


def test_one_that_fails_while_it_is_timed_costs_only_its_own_figure(capsys: pytest.CaptureFixture[str]) -> None:
    calls = 0

    def step(batch: gpu.Host) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise RuntimeError("out of memory")
        return np.ones(2)

    runners = [
        gpu.Contender("ours", lambda: lambda batch: np.ones(2), np.asarray, lambda: None),
        gpu.Contender("other", lambda: step, np.asarray, lambda: None),
    ]
    figures = gpu.race("training step", runners, "fp32", [{}] * 4, 8, gpu.Effort(3, 1, 1.0, float("inf")))
    assert [f.contender for f in figures] == ["ours"]
    assert "other stops: out of memory" in capsys.readouterr().out


def test_without_compute_sanitizer_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="not on the PATH"):
        gpu.main(["--sanitize"])


def test_a_checker_that_does_not_finish_ends_with_all_it_has_started(tmp_path: Path) -> None:
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
time.sleep(60)
"""
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_checks._run_group([sys.executable, "-c", code], 3)
    child = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    for _ in range(50):
        if not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the checker's own program goes on")


def test_kernels_that_the_model_does_not_know_are_told_all_the_same(
    monkeypatch: pytest.MonkeyPatch, fp32: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_checks, "_times", lambda *a: [("some_kernel", 12.5)])
    batch = {"labels": np.zeros(2, np.int32)}
    rows = gpu_checks.kernel_times(fp32, {}, 10, batch, "fp32", (227, 227, 3), 224, dry=False)
    assert rows == [{"kernel": "some_kernel", "measured us": 12.5}]
    assert "some_kernel                 12.5" in capsys.readouterr().out


def test_pytorch_that_sees_no_card_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    layer: Any = None
    ops: Any = None
    assert gpu_convolution._with_torch(layer, ops)("y", 1) == "-"


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
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


def test_columns_that_a_card_has_no_memory_for_go_through_in_pieces(
    backend: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 GB do not hold conv1's at 1024 images; the gradient of the weights is the whole batch's all the same."""
    ops = backend("bf16")
    shape = ConvShape(5, 6, 6, 16, 3, 3, 16, 1, 1, 2)
    random = np.random.default_rng(1)
    draw = functools.partial(random.standard_normal, dtype=np.float32)
    x, dy = (pictures(ops.asarray(draw((5, 6, 6, 16)))) for _ in range(2))
    layer = gpu_convolution.Layer("some", shape, x, ops.asarray(draw((3, 3, 8, 16))), dy)
    whole = ops.to_host(gpu_convolution.passes(layer, columns=True)["dw"]())
    monkeypatch.setattr(convolution, "images_at_once", lambda shape: 2)
    pieces = ops.to_host(gpu_convolution.passes(layer, columns=True)["dw"]())
    np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-4)
