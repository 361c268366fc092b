"""What docs/formats.md shows in Python, run: features of a layer, and the gradient of a score, down to the pixels."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stages.trained
from net.layers import Run
from net.network import forward, prepare
from stages.trained import Trained, load_trained

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"
BORDER = {"crop": 64, "border": (2, 1), "bgr": True, "scale": 0.01}  # 67 pixels, like what the run was trained on


@pytest.mark.parametrize("changed", [{}, BORDER], ids=["as trained", "border, BGR"])
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_the_gradient_of_a_score(
    trained_run: Path, changed: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: Any) -> Trained:
        trained = load_trained(*given)
        return replace(trained, config=replace(trained.config, input=replace(trained.config.input, **changed)))

    monkeypatch.setattr(stages.trained, "load_trained", load)
    (text,) = re.findall(r"<!-- in Python -->\n```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
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
