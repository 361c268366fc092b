"""``--stage verify`` finds every damaged file and names the cure; preprocessing then makes exactly that again."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import run_pipeline
from data import demo
from pipeline.checkpoint import note_best, save_checkpoint
from pipeline.config import load_config
from pipeline.config_values import to_dict
from pipeline.run_dir import write_sealed
from tests.command_line import pipeline


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Path]:
    """A preprocessed run with two small checkpoints."""
    run = tmp_path_factory.mktemp("complete") / "run"
    shutil.copytree(prepared, run)
    arrays = {"w": np.arange(1000, dtype=np.float32)}
    for step in (1, 2):
        save_checkpoint(run / "train", step, {"config": to_dict(load_config("seed"))}, arrays)
    yield run
    shutil.rmtree(run)


@pytest.fixture
def run(tmp_path: Path, complete: Path) -> Path:
    path = tmp_path / "run"
    shutil.copytree(complete, path)
    return path


def flip(path: Path, place: float) -> None:
    """Flip a bit at that part of a file."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 4
    path.write_bytes(data)


def verify(run: Path):
    return pipeline("--stage", "verify", "--run", run)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "metrics.jsonl"}


def test_a_demo_run_that_was_moved_mends_itself_from_the_demo_set_it_took_along(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new name"
    demo.draw(old / "demo", jobs=1, train=2, val=1)
    shrunk = ("--set", "preprocess.shard_images=10", "--set", "preprocess.size=72", "--set", "input.crop=67")
    pipeline("--stage", "preprocess", "--run", old, "--jobs", 1, *shrunk).done()
    before = contents(old / "preprocess")
    old.rename(new)
    flip(new / "preprocess" / "train-00000.h5", 0.5)
    sentence = verify(new).refused("1 of .* files are damaged")
    assert sentence.endswith(f"python run_pipeline.py --stage preprocess --run '{new}'")
    pipeline(*shlex.split(sentence.partition("run_pipeline.py ")[2]), "--jobs", 1).done()
    assert contents(new / "preprocess") == before


def test_a_sound_run(run: Path) -> None:
    before = contents(run / "preprocess"), contents(run / "train")
    result = verify(run).done()
    # config.json, manifest.json, latest.json; 3 + 2 shards and the 4 files that describe them; 2 checkpoints
    assert f"verify: all 14 files of {run} are sound" in result.out
    assert "verify: 2/2 MB" in result.err
    assert (contents(run / "preprocess"), contents(run / "train")) == before


@pytest.mark.parametrize("place", [0.0, 0.3])
def test_damaged_shards_are_named_and_made_again_to_the_same_bytes(run: Path, small_source: Path, place: float) -> None:
    folder = run / "preprocess"
    before = contents(folder)
    kept = {name: (folder / name).stat().st_ino for name in before if name.endswith(".h5")}
    flip(folder / "train-00001.h5", place)
    flip(folder / "val-00000.h5", 1 - place - 0.001)
    result = verify(run)
    sentence = result.refused(r"^error: 2 of 14 files are damaged", r"train-00001\.h5", r"val-00000\.h5")
    assert f"--stage preprocess --run {run} --source {small_source}" in sentence
    assert result.out.count("damaged: ") == 2
    command = sentence.partition("run_pipeline.py ")[2].split()
    result = pipeline(*command, "--jobs", 1).done()
    assert "verification found damage" in result.out
    assert contents(folder) == before
    changed = {name for name, inode in kept.items() if (folder / name).stat().st_ino != inode}
    assert changed == {"train-00001.h5", "val-00000.h5"}
    verify(run).done()
    assert "nothing to do" in pipeline(*command).done().out


def test_a_missing_shard_does_not_hide_what_verification_found(run: Path, small_source: Path) -> None:
    """Preprocessing sees by itself that a shard is missing, and only from the note that another has changed."""
    folder = run / "preprocess"
    before = contents(folder)
    flip(folder / "train-00001.h5", 0.3)
    (folder / "val-00000.h5").unlink()
    verify(run).refused(r"2 of 14 files", r"train-00001\.h5", r"val-00000\.h5")
    result = pipeline("--stage", "preprocess", "--run", run, "--source", small_source, "--jobs", 1).done()
    assert f"making again what is missing or damaged in {folder}: val-00000.h5" in result.out
    assert f"verification found damage in {folder}; comparing every shard with its checksum" in result.out
    assert contents(folder) == before


def test_missing_files_are_named_and_made_again(run: Path, small_source: Path) -> None:
    folder = run / "preprocess"
    before = contents(folder)
    names = ["color.json", "classes.json", "mean.npy", "rejects.jsonl", "train-00000.h5"]
    for name in names:
        (folder / name).unlink()
    verify(run).refused(r"5 of 14 files", *names)
    pipeline("--stage", "preprocess", "--run", run, "--source", small_source, "--jobs", 1).done()
    assert contents(folder) == before


def test_damaged_manifest_is_written_again(run: Path, small_source: Path) -> None:
    folder = run / "preprocess"
    before = contents(folder)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"size": 72', '"size": 73'))
    verify(run).refused(r"1 of \d+ files", r"manifest\.json")
    pipeline("--stage", "preprocess", "--run", run, "--source", small_source, "--jobs", 1).done()
    assert contents(folder) == before


def test_damaged_checkpoints_and_indexes_are_named(run: Path) -> None:
    flip(run / "train" / "step-00000002.ckpt", 0.9)
    sentence = verify(run).refused(r"1 of 14 files", r"step-00000002\.ckpt", "--stage train --resume goes on")
    assert "preprocess" not in sentence
    (run / "train" / "step-00000002.ckpt").unlink()
    verify(run).refused(r"1 of 13 files", r"latest\.json", "remove the damaged index")
    (run / "train" / "latest.json").write_text("{}")
    verify(run).refused(r"1 of 13 files", r"latest\.json")


def said(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What verification says of damage."""
    assert run_pipeline.main(["--stage", "verify", "--run", str(run)]) == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_a_manifest_of_another_version_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sealed(run / "preprocess" / "manifest.json", {"schema": 0})
    assert f"files are damaged ({run / 'preprocess' / 'manifest.json'}); make again" in said(run, capsys)


def test_an_index_of_the_best_that_names_no_checkpoint_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run / "train" / "step-00000001.ckpt"
    note_best(run / "train", first, 1, 0.5)
    first.unlink()
    assert f"({run / 'train' / 'best.json'}); remove the damaged index in train/" in said(run, capsys)


def test_the_remedy_names_where_the_pictures_were_last(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(run / "preprocess" / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"source": "/moved/here"}) + "\n")
    (run / "preprocess" / "train-00001.h5").unlink()
    assert said(run, capsys).endswith(f"--stage preprocess --run {run} --source /moved/here")


def test_damaged_configuration_is_named(run: Path) -> None:
    path = run / "config.json"
    path.write_text(path.read_text().replace('"momentum": 0.9', '"momentum": 0.8'))
    verify(run).refused(
        r"1 of 14 files", r"config\.json", r"; remove config\.json, and the settings are taken from the"
    )
    shutil.rmtree(run / "train")
    verify(run).refused(r"1 of 11 files", r"config\.json", "; name the recipe with --recipe")


def test_nothing_to_verify(tmp_path: Path) -> None:
    verify(tmp_path / "none").refused(r"there is no run .*none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    verify(tmp_path / "empty").refused(r"there is nothing to verify in .*empty; name a run with --run")
