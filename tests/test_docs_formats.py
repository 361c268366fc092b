"""What docs/formats.md shows in Python, run: features, the gradient of a score, the worst mistakes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import stages.trained
from net.layers import Run
from net.network import forward, prepare
from stages.trained import Trained, load_trained

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"
BORDER = {"crop": 64, "border": (2, 1), "bgr": True, "scale": 0.01}  # 67 pixels, like what the run was trained on


def example(mark: str) -> str:
    """The page's block of Python after this mark."""
    pattern = rf"<!-- {mark} -->\n```python\n(.*?)^```$"
    (text,) = re.findall(pattern, PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return text


@pytest.mark.parametrize("changed", [{}, BORDER], ids=["as trained", "border, BGR"])
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_the_gradient_of_a_score(
    trained_run: Path, changed: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: Any) -> Trained:
        trained = load_trained(*given)
        return replace(trained, config=replace(trained.config, input=replace(trained.config.input, **changed)))

    monkeypatch.setattr(stages.trained, "load_trained", load)
    text = example("in Python")
    for written, here in (("runs/default", str(trained_run)), ('"cpu"', f'"{device}"')):
        assert text.count(written) == 1
        text = text.replace(written, here)
    seen: dict[str, Any] = {"__name__": "example"}
    exec(compile(text, str(PAGE), "exec"), seen)  # noqa: S102
    trained, ops, gradient, number = (seen[name] for name in ("trained", "ops", "gradient", "number"))
    assert seen["features"].shape == (2, 3, 3, 256)  # 13 x 13 with pictures of the usual size
    assert gradient.shape == (2, trained.config.input.crop, trained.config.input.crop, 3)

    few = np.random.default_rng(1).random(gradient.shape) < 0.01  # of all pixels the sum would not be a small step
    inputs = trained.inputs([np.clip(square, 1, 254) for square in seen["squares"]], views=1)

    def score(offset: int) -> np.ndarray:
        """Of the pictures with a few pixels moved by one grey level the way that raises the score, or lowers it."""
        images = (inputs["images"] + offset * few * np.sign(gradient)).astype(np.uint8)
        x = prepare(ops, trained.preparation(ops), ops.upload({**inputs, "images": images}))
        scores, _ = forward(ops, trained.layers, seen["parameters"], x, Run(training=False))
        return ops.to_host(scores)[:, number]

    risen = (score(1) - score(-1)) / 2
    np.testing.assert_allclose(risen, np.abs(few * gradient).sum(axis=(1, 2, 3)), rtol=0.05)
    assert (risen > 0).all()


@pytest.mark.parametrize(("device", "steps"), [("reference", 5), ("cpu", 12)])
def test_a_loop_of_ones_own_learns(device: str, steps: int) -> None:
    text = example("own loop")
    assert text.count('"cpu"') == text.count("range(12)") == 1
    text = text.replace('"cpu"', f'"{device}"').replace("range(12)", f"range({steps})")
    seen: dict[str, Any] = {"__name__": "example"}
    exec(compile(text, str(PAGE), "exec"), seen)  # noqa: S102
    assert seen["probabilities"].shape == (64, 4)
    assert np.mean(seen["losses"][-3:]) < seen["losses"][0]


def test_the_worst_mistakes_and_the_names_of_their_pictures(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names are those that pictures have in the source: their folder is their class."""
    run = tmp_path / "runs" / "default"
    shutil.copytree(trained_run / "preprocess", run / "preprocess")
    with h5py.File(next((run / "preprocess").glob("val-*.h5")), "r+") as file:
        for row, name in enumerate(file["source"][()]):
            file["source"][row] = name.replace(b".png", b"\xff.")  # no UTF-8; of a name that is as long as before
    labels = np.load(trained_run / "eval" / "predictions.npz")["labels"]
    wrong = np.arange(0, len(labels), 2)  # of 13 pictures in two shards
    top, loss = labels.copy(), np.linspace(1, 4, len(labels))
    top[wrong] = (labels[wrong] + 1) % 5
    (run / "eval").mkdir()
    np.savez(run / "eval" / "predictions.npz", labels=labels, top=top[:, None], loss=loss)
    monkeypatch.chdir(tmp_path)
    exec(compile(example("worst mistakes"), str(PAGE), "exec"), {})  # noqa: S102
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [f"{x:.2f}" for x in loss[wrong][::-1]]
    classes = [e["wnid"] for e in json.loads((run / "preprocess" / "classes.json").read_text())["classes"]]
    for (_, name, true, *_, said), row in zip(lines, wrong[::-1], strict=True):
        assert (true, said) == (classes[labels[row]], classes[top[row]])
        assert name.startswith(f"{true}/")
    assert any(r"\xff" in name for _, name, *_ in lines)
