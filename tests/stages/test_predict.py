"""Prediction: the evaluation's own answers for the same pictures, whatever the file, and plain words for bad ones."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import run_pipeline
from data.images import read_square
from data.manifest import read_manifest
from data.split import open_split
from pipeline.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, save_checkpoint
from pipeline.config import RECIPES
from pipeline.config_values import changes
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir
from stages import predict as predict_stage
from stages import trained as trained_stage
from stages.predict import bar
from stages.trained import Trained
from tests.command_line import ROOT
from tests.pictures import sources


def predict(run: Path, *arguments: object) -> int:
    return run_pipeline.main(["--stage", "predict", "--run", str(run), *map(str, arguments)])


def answers(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def picture(small_source: Path) -> Path:
    return small_source / "val" / "class0" / "val0.png"


def test_same_answers_as_the_evaluation(
    trained_run: Path, small_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each validation picture, read from its source file, gets what the evaluation said of its shard's copy."""
    run = RunDir(trained_run)
    split = open_split(run.preprocess, read_manifest(run), "val")
    with np.load(run.eval / "predictions.npz") as file:
        top, probability = file["top"], file["probability"]
    files = [small_source / "val" / name.decode() for name in sources(split)]
    assert predict(trained_run, "--json", "--views", 10, *files) == 0
    said = answers(capsys)
    assert [answer["file"] for answer in said] == [str(file) for file in files]
    for answer, classes, p in zip(said, top, probability, strict=True):
        assert [entry["class"] for entry in answer["top"]] == classes.tolist()
        assert [entry["wnid"] for entry in answer["top"]] == [f"class{number}" for number in classes]
        np.testing.assert_allclose([entry["probability"] for entry in answer["top"]], p, atol=2e-5)
    assert np.ptp(probability[:, 0]) > 1e-4  # the pictures are told apart at all


def test_views_differ(trained_run: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(trained_run, "--json", "--views", 1, picture) == 0
    assert predict(trained_run, "--json", "--views", 10, picture) == 0
    one, ten = answers(capsys)
    assert one["top"] != ten["top"]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "BMP", "PPM", "TGA", "ICO", "stdin"])
def test_any_format_gives_the_same_answer(
    format: str,
    trained_run: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    square = Image.open(picture).convert("RGB").resize((72, 72))
    wanted = tmp_path / "wanted.png"
    square.save(wanted)
    data = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {"sizes": [(72, 72)]} if format == "ICO" else {}
    square.save(data, "PNG" if format == "stdin" else format, **options)
    name = str(tmp_path / "picture")  # without a suffix: the content tells
    (tmp_path / "picture").write_bytes(data.getvalue())
    if format == "stdin":
        name = "-"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.getvalue())))
    assert predict(trained_run, "--json", wanted, name) == 0
    first, second = answers(capsys)
    assert second["file"] == name
    assert first["top"] == second["top"]


def test_a_photograph_that_lies_on_its_side_is_turned(
    trained_run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upright, lying = Image.open(picture).convert("RGB").resize((100, 72)), tmp_path / "lying.png"
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(lying, exif=exif)
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "unturned.png")
    names = [tmp_path / name for name in ("upright.png", "lying.png", "unturned.png")]
    assert predict(trained_run, "--json", *names) == 0
    first, second, third = (answer["top"] for answer in answers(capsys))
    assert first == second != third


def test_bad_pictures_are_named_and_the_others_shown(
    trained_run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "holiday"
    (folder / "deep").mkdir(parents=True)
    whole = picture.read_bytes()
    (folder / "a.png").write_bytes(whole)
    (folder / "b.jpg").write_bytes(b"no picture")
    (folder / "c.png").write_bytes(whole[: len(whole) // 2])
    (folder / "deep" / "d.PNG").write_bytes(whole)
    (folder / "notes.txt").write_text("left out")
    shutil.copyfile(next((trained_run / "preprocess").glob("*.h5")), folder / "shard.h5")  # Pillow knows the name
    (folder / ".hidden.png").write_bytes(whole)
    (folder / "e.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    missing = tmp_path / "missing.png"
    long = tmp_path / ("x" * 300)
    assert predict(trained_run, folder, missing, long, picture) == 1
    out, err = capsys.readouterr()
    shown = [line for line in out.splitlines() if line and not line.startswith("  ")]
    assert shown == [str(folder / "a.png"), str(folder / "deep" / "d.PNG"), str(picture)]
    assert f"{folder / 'b.jpg'}: not a picture" in err
    assert f"{folder / 'c.png'}: the decoder says" in err
    assert f"{folder / 'e.eps'}: not a picture" in err  # Ghostscript would run it
    assert f"{missing}: No such file" in err
    assert f"{long}: File name too long" in err
    assert "2 of 7 files are no pictures" in err
    assert "shard.h5" not in err
    assert err.splitlines()[-1] == "error: 5 of 8 pictures could not be read; the reasons are above"

    assert predict(trained_run, "--json", folder / "b.jpg", folder / "a.png", folder / "shard.h5") == 1
    bad, good, shard = answers(capsys)
    assert bad == {"file": str(folder / "b.jpg"), "error": "not a picture in a known format"}
    assert shard == {"file": str(folder / "shard.h5"), "error": "not a picture in a known format"}
    assert len(good["top"]) == 5


@pytest.fixture
def folder_too_deep(tmp_path: Path) -> Iterator[Path]:
    """A folder with one below it that cannot be opened, because its path is too long; mode bits would not stop root."""
    folder = tmp_path / "folder"
    folder.mkdir()
    inside = os.open(folder, os.O_RDONLY)
    for _ in range(17):
        os.mkdir("d" * 250, dir_fd=inside)
        further = os.open("d" * 250, os.O_RDONLY, dir_fd=inside)
        os.close(inside)
        inside = further
    os.close(inside)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("picture_below", [True, False])
def test_a_folder_below_that_cannot_be_read_is_named(
    picture_below: bool, trained_run: Path, picture: Path, folder_too_deep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if picture_below:
        shutil.copyfile(picture, folder_too_deep / "a.png")
    assert predict(trained_run, folder_too_deep) == 1
    out, err = capsys.readouterr()
    assert (str(folder_too_deep / "a.png") in out) == picture_below
    assert re.search(rf"^{folder_too_deep}/\S+: File name too long$", err, re.MULTILINE)
    assert err.splitlines()[-1] == "error: 1 folder could not be read; the reasons are above"
    assert predict(trained_run, "--json", folder_too_deep, "missing.png") == 1
    out, err = capsys.readouterr()
    errors = {answer["file"]: answer["error"] for answer in map(json.loads, out.splitlines()) if "error" in answer}
    assert sorted(errors.values()) == ["File name too long", "No such file or directory"]
    pictures = 1 + picture_below
    assert (
        err.splitlines()[-1] == f"error: 1 of {pictures} pictures and 1 folder could not be read; the reasons are above"
    )


def test_of_what_lies_below_a_folder_links_are_read_and_pipes_are_not(
    trained_run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").symlink_to(picture)
    os.mkfifo(folder / "pipe.png")
    assert predict(trained_run, folder) == 0
    (folder / "broken.png").symlink_to(folder / "nowhere")
    assert predict(trained_run, folder) == 1
    assert f"{folder / 'broken.png'}: No such file or directory" in capsys.readouterr().err


def test_without_shards_the_checkpoint_names_its_classes(tmp_path: Path) -> None:
    def classes(**header: list[str]) -> list[dict[str, str]]:
        return trained_stage._own_classes(Checkpoint(tmp_path / "step-00000001.ckpt", header, {}, ""), 2)

    wnids, named = ["n01", "n02"], [{"wnid": "n01", "words": ""}, {"wnid": "n02", "words": ""}]
    assert classes(wnids=wnids) == named
    named[1]["words"] = "dog"
    assert classes(wnids=wnids, words=["", "dog"]) == named
    assert classes() == [{"wnid": "", "words": ""}] * 2


def test_an_imported_mean_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    for side in (256, 227):  # stored pictures and crops
        assert trained_stage._mean(RunDir(tmp_path), np.zeros((side, side, 3)), RECIPES["caffe"]).dtype == np.float32
    with pytest.raises(PipelineError, match="which fits neither the stored pictures"):
        trained_stage._mean(RunDir(tmp_path), np.zeros((100, 100, 3)), RECIPES["caffe"])


def test_a_checkpoint_with_other_arrays_than_its_configuration_says_is_refused(
    trained_run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = load_checkpoint(find_checkpoint(trained_run / "train", "latest"))
    few = {name: array for name, array in saved.arrays.items() if name.startswith("conv1")}
    path = save_checkpoint(tmp_path, 1, saved.header, few)
    assert predict(trained_run, picture, "--checkpoint", path) == 1
    assert f"{path} holds other arrays than its configuration says" in capsys.readouterr().err


def test_pictures_are_resized_as_the_checkpoints_were(picture: Path) -> None:
    config = changes(settings=["preprocess.filter=box"])(RECIPES["seed"])
    square = predict_stage._read(str(picture), config)
    assert np.array_equal(square, read_square(picture.read_bytes(), 256, "box", Counter()))


def test_a_file_beyond_all_measure_is_refused(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_stage, "LARGEST_FILE", 1000)
    assert predict_stage._read(str(picture), RECIPES["seed"]) == "it is larger than 0 MiB"


def test_pictures_of_a_folder_come_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").touch()
    walk = os.walk
    for order in (1, -1):
        monkeypatch.setattr(
            os, "walk", lambda top, order=order, **how: [(p, d, sorted(n)[::order]) for p, d, n in walk(top, **how)]
        )
        found = predict_stage._expand([str(tmp_path)], lambda error: None)
        assert [Path(name).name for name in found] == ["a.png", "b.png", "c.png"]


def test_a_name_that_is_no_text_can_be_printed() -> None:
    assert predict_stage._printable(os.fsdecode(b"p\xff.png")) == "p?.png"


def test_bars_fit_the_terminal(
    trained_run: Path, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in (40, 61, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert predict(trained_run, picture) == 0
        lines = capsys.readouterr().out.splitlines()[1:6]
        assert all("%" in line and len(line) <= columns for line in lines)
        shares = [float(line.split("%")[0].split()[-1]) for line in lines]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(100, abs=0.3)


def test_bars_stand_below_each_other_whatever_the_names(
    trained_run: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Chinese sign takes two columns, an accent on its own none; a name cannot send orders to the terminal."""
    names = ["cat", "\u732b", "\u72ac" * 40, "e\u0301te\u0301", "\x1b[2Jgone\n"]
    monkeypatch.setattr(Trained, "label", lambda self, number: names[number])
    monkeypatch.setenv("COLUMNS", "60")
    odd = tmp_path / "a\n\x1b[2J.png"
    odd.write_bytes(picture.read_bytes())
    assert predict(trained_run, odd) == 0
    out = capsys.readouterr().out
    assert "a??[2J.png" in out
    assert "\x1b" not in out
    shown = {line[2:].split("  ")[0]: line for line in out.splitlines() if "%" in line}
    assert set(shown) == {"cat", "\u732b", "\u72ac" * 14 + "..", "e\u0301te\u0301", "?[2Jgone?"}
    places = {
        len(line[: line.index("%")]) + sum(map(line.count, "\u732b\u72ac")) - line.count("\u0301")
        for line in shown.values()
    }
    assert len(places) == 1


def test_bars_count_eighths(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert bar(1, 4) == "████"
    assert bar(0, 4) == ""
    assert bar(0.5 + 3 / 32, 4) == "██▍"
    Terminal.encoding = "ascii"
    assert bar(0.6, 5) == "###"


@pytest.mark.parametrize("content", [b"{}", b'{"classes": 3}', b'{"classes": [{}, {}, {}, {}, {}]}', b"other"])
@pytest.mark.parametrize("manifest", [True, False])
def test_damaged_class_names_are_refused_by_name(
    manifest: bool, content: bytes, trained_run: Path, picture: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a manifest any change is found, without one what makes no sense."""
    (run / "train").symlink_to(trained_run / "train")
    path = run / "preprocess" / "classes.json"
    path.write_bytes(path.read_bytes().replace(b"class1", b"class7") if content == b"other" else content)
    if not manifest:
        (run / "preprocess" / "manifest.json").unlink()
    assert predict(run, picture) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert str(path) in said
    assert f"--stage preprocess --run {run}" in said or "trained on other classes" in said


@pytest.mark.parametrize("names", [{"wnids": ["a"]}, {"words": "cat"}, {"words": {"a": 1}}])
def test_class_names_that_a_checkpoint_has_too_few_of_are_refused(
    names: dict, trained_run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = load_checkpoint(find_checkpoint(trained_run / "train", "latest"))
    path = save_checkpoint(tmp_path / "run" / "train", 1, {**saved.header, **names}, saved.arrays)
    assert predict(tmp_path / "run", picture) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {path} names other classes than its 5")


def test_a_damaged_mean_picture_is_refused_by_name(
    trained_run: Path, picture: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = load_checkpoint(find_checkpoint(trained_run / "train", "latest"))
    saved.header["config"]["input"]["mean"] = "image"
    save_checkpoint(run / "train", 1, saved.header, saved.arrays)
    assert predict(run, picture) == 0
    path = run / "preprocess" / "mean.npy"
    sound = path.read_bytes()
    middle = len(sound) // 2
    for manifest in (True, False):
        for content in (b"", sound[:1000], sound[:middle] + b"7" + sound[middle + 1 :]):
            if not manifest and len(content) == len(sound):
                continue  # nothing is left that could tell
            path.write_bytes(content)
            capsys.readouterr()
            assert predict(run, picture) == 1
            said = capsys.readouterr().err.splitlines()[-1]
            assert str(path) in said
            assert f"--stage preprocess --run {run}" in said
        (run / "preprocess" / "manifest.json").unlink(missing_ok=True)


def test_a_run_that_lost_its_index_is_sound_and_predicts(
    trained_run: Path, picture: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(trained_run, "--json", picture) == 0
    wanted = capsys.readouterr().out
    (run / "train").mkdir()
    newest = run / "train" / find_checkpoint(trained_run / "train", "latest").name
    newest.symlink_to(trained_run / "train" / newest.name)
    assert run_pipeline.main(["--stage", "verify", "--run", str(run)]) == 0
    capsys.readouterr()
    assert predict(run, "--json", picture) == 0
    out, err = capsys.readouterr()
    assert out == wanted
    assert f"latest.json is missing: the newest sound checkpoint is {newest}\n" in err


def test_a_reader_that_goes_away_ends_it_without_a_word(trained_run: Path, picture: Path) -> None:
    command = [sys.executable, "run_pipeline.py", "--stage", "predict", "--json", "--run", trained_run]
    with subprocess.Popen(
        [*map(str, command), *[str(picture)] * 100], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"top" in process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == 141, said
    assert b"error" not in said
    assert b"no reader" not in said
    assert b"Broken" not in said


def test_what_is_missing_is_said(
    trained_run: Path,
    picture: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert predict(tmp_path / "nowhere", picture) == 1
    assert f"there is no run {tmp_path / 'nowhere'};" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)  # not the checkout, where the runs are
    assert predict(Path("runs/x"), picture) == 1
    assert f"there is no run runs/x in {tmp_path};" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    assert predict(run, picture) == 1
    assert "train first" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert predict(trained_run, tmp_path / "empty") == 1
    assert "there is no picture" in capsys.readouterr().err
    for wrong in ([], ["--views", "3", "x.png"], ["--precision", "int8", "x.png"]):
        with pytest.raises(SystemExit) as left:
            predict(trained_run, *wrong)
        assert left.value.code == 2
    capsys.readouterr()
