"""data/published.py: an archive that is not the published one, or holds too few pictures, is told."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from data import ilsvrc, published
from data.sources import ClassEntry, read_source
from pipeline.errors import PipelineError
from stages.preprocess import check_archives
from tests.command_line import ROOT, pipeline
from tests.data.archives import small_official


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small archives, taken for the published ones."""
    folder = small_official(tmp_path / "source")
    data = {name: (folder / name).read_bytes() for name in published.ARCHIVES}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in data.items()}
    sizes = {name: None if name == ilsvrc.DEVKIT else len(content) for name, content in data.items()}
    monkeypatch.setattr(published, "ARCHIVES", {name: (sizes[name], sums[name]) for name in data})
    return folder


def test_the_published_archives_pass(official: Path, capsys: pytest.CaptureFixture[str]):
    check_archives(official)
    assert "are the published archives, by their MD5 sums" in capsys.readouterr().out
    counted: list[int] = []
    published.check(official / ilsvrc.TRAIN, counted.append)
    assert sum(counted) == (official / ilsvrc.TRAIN).stat().st_size


@pytest.mark.parametrize("name", list(published.ARCHIVES))
def test_one_changed_bit_is_told(official: Path, name: str):
    path = official / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(PipelineError, match=rf"{name} has the MD5 sum \w+, the published archive \w+: .*get it again"):
        check_archives(official)


def test_the_real_command_line_names_an_archive_that_is_not_the_published_one(tmp_path: Path, ilsvrc_mini: Path):
    common = ("--stage", "preprocess", "--run", tmp_path / "run", "--check-archives", "--source")
    sentence = pipeline(*common, ilsvrc_mini).refused(
        r"img_train\.tar has \d+ bytes, the published archive 147897477120"
    )
    assert "leave out --check-archives" in sentence
    pipeline(*common, tmp_path).refused(r"--check-archives compares the official .* holds none; leave it out")
    assert not list((tmp_path / "run").rglob("*.h5"))


def test_the_published_archives_have_the_pictures_that_readme_counts():
    readme = (ROOT / "README.md").read_text()
    assert f"hold {sum(published.PICTURES.values()):,} pictures" in readme


def test_missing_pictures_are_told(official: Path, monkeypatch: pytest.MonkeyPatch):
    source = read_source(official)
    assert published.shortfalls(source) == []  # three classes: another set altogether
    source = replace(source, classes=(ClassEntry("n", None, None),) * 1000)
    monkeypatch.setattr(published, "PICTURES", {ilsvrc.TRAIN: 9, ilsvrc.VAL: 5})
    assert published.shortfalls(source) == [f"{official / ilsvrc.VAL} holds 4 of the 5 published pictures"]
    monkeypatch.setattr(published, "PICTURES", {ilsvrc.TRAIN: 8, ilsvrc.VAL: 4})
    assert published.shortfalls(source) == [f"{official / ilsvrc.TRAIN} holds 9 of the 8 published pictures"]
    monkeypatch.setattr(published, "PICTURES", {ilsvrc.TRAIN: 9, ilsvrc.VAL: 4})
    assert published.shortfalls(source) == []
