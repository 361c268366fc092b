"""docs/design.md: its example, and the names it sends to."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from pipeline.config import SEED, at_epoch
from pipeline.config_values import changes

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
CHANGES = TEXT.partition("## Where to change what\n")[2].partition("\n## ")[0]


def test_the_cosine_is_a_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = re.findall(r"<!-- cosine -->\n```python\n(.*?)^```$", CHANGES, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "design.md", "exec"), {})  # noqa: S102
    train = changes(toml=Path("cosine.toml"))(SEED).train
    assert train.epochs == len(train.lr) == 90
    rates = [at_epoch(train.lr, epoch) for epoch in (0, 30, 45, 60)]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_every_file_and_folder_named_where_to_change_what_is_there() -> None:
    named = re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", CHANGES)
    assert len(named) > 15
    for path in named:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("pipeline.config", "LAYERS Network RECIPES"),
        ("pipeline.config_values", "_check _WORDS _least_side"),
        ("stages.pretrained", "_NETWORK_FREE _INPUT_FREE"),
        ("stages.setup", "learning_rate"),
        ("stages.trained", "Trained"),
        ("stages.batches", "TrainingPlan"),
        ("data.sampling", "_ORDER Crops view_crops Augmentation"),
        ("data.loader", "_slot _fill"),
        ("net.network", "prepare"),
        ("net.layers", "fuse"),
        ("net.backend", "OPERATIONS FUSED_OPERATIONS"),
        ("net.cpu.update", "sgd_update _update"),
        ("net.cpu.weight_gradient", "_descend"),
        ("net.cpu.loss", "cross_entropy"),
        ("net.cpu.ahead", "PARTS"),
        ("tests.net.test_cpu", "test_training_agrees_with_the_reference"),
    ],
)
def test_every_name_is_where_the_page_says(module: str, names: str) -> None:
    for name in names.split():
        assert f"`{name}`" in CHANGES or f"`{name}." in CHANGES, name
        assert hasattr(importlib.import_module(module), name), name
