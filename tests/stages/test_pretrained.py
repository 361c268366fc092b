"""Training that begins with weights from a file, through the command line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import run_pipeline
from pipeline.checkpoint import Checkpoint, checkpoints, load_checkpoint, save_checkpoint
from pipeline.command_line import STAGES
from pipeline.config import CAFFE
from pipeline.config_values import as_text, flatten, to_dict
from pipeline.run_dir import RunDir, hash_file, read_sealed
from stages import export, weights_file
from stages.trained import load_trained
from tests import pictures
from tests.command_line import QUICK, ROOT, Result, pipeline, settings

STILL = (
    "train.lr=[[0,0.0]]",
    "network.final_relu=false",
)  # a step changes nothing: what it began with is what it saves
HIDDEN = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")
FROZEN = f"train.frozen=[{', '.join(f'{name!r}' for name in HIDDEN)}]".replace("'", '"')


def train(run: Path, *arguments: object, set: tuple[str, ...] = STILL):
    return pipeline("--stage", "train", "--run", run, "--steps", 1, *settings(*set), *arguments)


def newest(run: Path) -> Checkpoint:
    return load_checkpoint(checkpoints(run / "train")[-1])


@pytest.fixture(scope="module")
def checkpoint(trained_run: Path) -> Path:
    return checkpoints(trained_run / "train")[-1]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preprocessed run whose pictures are of three classes."""
    folder = tmp_path_factory.mktemp("others")
    pictures.draw(folder / "source", {"train": (4, 4, 4), "val": (2, 2, 2)})
    run = folder / "run"
    arguments = ("--source", folder / "source", "--run", run, "--jobs", 1)
    pipeline("--stage", "preprocess", *arguments, *settings(*QUICK)).done()
    return run


@pytest.mark.parametrize("form", [".ckpt", "safetensors", "torch"])
def test_with_the_same_classes_all_weights_are_the_files(
    form: str, run: Path, checkpoint: Path, tmp_path: Path
) -> None:
    theirs = load_checkpoint(checkpoint).arrays
    file = tmp_path / "a.ckpt"
    if form == ".ckpt":
        shutil.copyfile(checkpoint, file)
    else:
        file = export.run(RunDir(checkpoint.parents[1]), None, checkpoint="latest", format=form)
    said = train(run, "--weights", file).done().out
    assert f"beginning with the weights of {file}\n" in said
    saved = newest(run)
    assert saved.header["pretrained"] == {"file": file.name, "sha256": hash_file(file), "drawn": []}
    assert saved.header["step"] == 1
    for name in load_trained(RunDir(run), "latest").parameters:
        np.testing.assert_array_equal(saved.arrays[name], theirs[name], name)
        assert not np.any(saved.arrays[f"momentum/{name}"]), name
    file.unlink()


def test_with_other_classes_the_last_layer_is_drawn_and_frozen_layers_stay(
    others: Path, checkpoint: Path, tmp_path: Path
) -> None:
    theirs, run = load_checkpoint(checkpoint).arrays, tmp_path / "run"
    shutil.copytree(others, run)
    moving = ("network.final_relu=false", "train.lr=[[0,0.01]]", FROZEN)
    said = train(run, "--weights", checkpoint, set=moving).done().out
    assert "fc8 drawn anew: its classes are not those of the pictures here" in said
    saved = newest(run)
    assert saved.header["pretrained"]["drawn"] == ["fc8"]
    assert saved.arrays["fc8.w"].shape == (250, 3)
    for layer in HIDDEN:
        for name in (f"{layer}.w", f"{layer}.b"):
            np.testing.assert_array_equal(saved.arrays[name], theirs[name], name)
            assert not np.any(saved.arrays[f"momentum/{name}"]), name
    assert np.any(saved.arrays["momentum/fc8.w"])


def test_classes_of_other_names_are_other_classes(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    source = pictures.draw(tmp_path / "source")
    for split in ("train", "val"):
        (source / split / "class4").rename(source / split / "class9")
    shutil.rmtree(run)
    arguments = ("--source", source, "--run", run, "--jobs", 1)
    pipeline("--stage", "preprocess", *arguments, *settings(*QUICK)).done()
    train(run, "--weights", checkpoint).done()
    assert newest(run).header["pretrained"]["drawn"] == ["fc8"]


def test_resuming_goes_on_to_the_same_weights(
    run: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing had been saved, from another working directory, with the file gone once it is not needed."""
    moving = ("network.final_relu=false", "train.lr=[[0,0.001]]")
    straight, file = tmp_path / "straight", tmp_path / "begin.ckpt"
    shutil.copytree(run, straight)
    shutil.copyfile(checkpoint, file)
    monkeypatch.chdir(tmp_path)  # the flag's path is relative, and what goes on comes from the checkout
    arguments = ["--stage", "train", "--run", str(run), "--steps", "1", "--weights", "begin.ckpt", "--seed", "1"]
    assert run_pipeline.main(arguments + settings(*moving)) == 0
    checkpoints(run / "train")[0].unlink()
    (run / "train" / "latest.json").unlink()
    pipeline("--stage", "train", "--run", run, "--resume", "--steps", 1).done()
    file.unlink()
    pipeline("--stage", "train", "--run", run, "--resume", "--steps", 1).done()
    shutil.copyfile(checkpoint, file)
    pipeline(
        *("--stage", "train", "--run", straight, "--steps", 2, "--weights", file, "--seed", 1), *settings(*moving)
    ).done()
    assert newest(run).seal == newest(straight).seal
    assert newest(run).header["pretrained"]["file"] == "begin.ckpt"


@pytest.fixture(scope="module")
def by_default(tmp_path_factory: pytest.TempPathFactory, small_source: Path) -> Path:
    """A run preprocessed as one does who names nothing."""
    run = tmp_path_factory.mktemp("default") / "run"
    pipeline("--stage", "preprocess", "--source", small_source, "--run", run, "--jobs", 1).done()
    return run


@pytest.fixture
def foreign(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of another recipe's network, with few units."""
    saved, caffe = load_checkpoint(checkpoint), to_dict(CAFFE)
    config = caffe | {
        "preprocess": saved.header["config"]["preprocess"],
        "input": caffe["input"] | {"crop": 67},
        "network": caffe["network"] | {"fc_units": 250},
    }
    return save_checkpoint(tmp_path / "foreign", 7, {**saved.header, "config": config}, saved.arrays)


def fine_tune(run: Path, *arguments: object) -> Result:
    return pipeline("--stage", "train", "--run", run, "--steps", 1, "--set", "train.lr=0.001", *arguments)


def test_where_no_recipe_is_named_the_network_is_the_files(by_default: Path, foreign: Path, tmp_path: Path) -> None:
    """And from then on the run's: it resumes, to the weights of a run whose settings were all named."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    for copy in (run, straight):
        shutil.copytree(by_default, copy)
    before = read_sealed(run / "config.json", "")
    own = ("--weights", foreign, *settings("train.batch_size=4", "network.dropout_keep=0.75", "network.lrn_k=1"))
    said = fine_tune(run, *own).done().out
    (line,) = [line for line in said.splitlines() if line.startswith("as no --recipe is named")]
    assert f"the network is that of {foreign} (recipe caffe), with its input.crop, input.border, " in line
    assert line.endswith("network.fc_units, network.final_relu, network.dropout_scale_in_training")
    after, theirs = read_sealed(run / "config.json", ""), load_checkpoint(foreign).header["config"]
    for part, name, value in (
        *(("input", name, value) for name, value in theirs["input"].items() if name != "jitter"),
        *(("input", name, before["input"][name]) for name in ("jitter", "jitter_epochs")),
        *(("network", name, before["network"][name]) for name in ("weight_std", "bias")),
        ("network", "dropout_keep", 0.75),
        ("network", "fc_units", 250),
        ("network", "lrn_alpha_over_n", True),
    ):
        assert after[part][name] == value, (part, name)
    assert (after["recipe"], after["preprocess"]) == (before["recipe"], before["preprocess"])
    assert newest(run).header["config"] == after

    again = fine_tune(run, "--resume").done().out
    assert "as no --recipe is named" not in again
    flat = dict(flatten(after))
    named = [f"{key}={as_text(value)}" for key, value in flat.items() if key.startswith(("input.", "network."))]
    command = ("--stage", "train", "--run", straight, "--steps", 2, "--recipe", "seed", "--weights", foreign)
    pipeline(*command, *settings(*named, "train.batch_size=4", "train.lr=0.001")).done()
    assert newest(run).seal == newest(straight).seal
    # A network that has been trained stays what it is, until it begins anew.
    fine_tune(run, "--resume", *settings("network.lrn_k=2")).refused("was trained with other settings")
    straight_recipe = fine_tune(straight, "--restart", "--weights", foreign, "--set", "network.lrn_k=2")
    straight_recipe.refused(r"network.lrn_k \(1.0 there, 2.0 here\)\. .*change these with --set or leave them out")


def test_a_checkpoint_is_read_once(
    run: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network is settled by its header, which every rank reads; the first one alone takes the weights."""
    read: list[Path] = []

    def reading(path: Path, remedy: str) -> Checkpoint:
        read.append(path)
        return load_checkpoint(path, remedy)

    monkeypatch.setattr(weights_file, "load_checkpoint", reading)
    arguments = ["--stage", "train", "--run", str(run), "--steps", "1", "--weights", str(checkpoint)]
    assert run_pipeline.main(arguments + settings("network.dropout_keep=0.75")) == 0
    assert f"beginning with the weights of {checkpoint}" in capsys.readouterr().out
    assert read == [checkpoint]


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_an_export_brings_its_network(format: str, by_default: Path, checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(by_default, run)
    file = export.run(RunDir(checkpoint.parents[1]), None, checkpoint="latest", format=format)
    said = fine_tune(run, "--weights", file).done().out
    file.unlink()
    assert f"the network is that of {file} (recipe seed), with its input.crop, input.border, network.fc_units," in said
    assert f"beginning with the weights of {file}\n" in said


def test_a_caffemodel_is_of_the_recipe_caffe(by_default: Path, run: Path, tmp_path: Path) -> None:
    file, default = tmp_path / "none.caffemodel", tmp_path / "default"
    shutil.copytree(by_default, default)
    fine_tune(default, "--weights", file).refused(f"cannot read {file}.*choose another file with --weights")
    file.write_bytes(b"no weights")
    result = fine_tune(default, "--weights", file)
    result.refused(f"cannot begin with {file}")
    assert f"the network is that of {file} (recipe caffe), with its input.crop, " in result.out
    fine_tune(run, "--weights", file).refused(
        f"the network in {file} takes crops of 227 pixels, and the pictures of this run are stored with 72; "
        "choose another file with --weights.* --set preprocess.size=256"
    )
    fine_tune(run, "--weights", file, "--recipe", "seed", *settings(*QUICK)).refused("begin with --recipe caffe")


def test_the_readmes_commands_fine_tune(small_source: Path, foreign: Path, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("**Fine-tuning.**")[2]
    commands = text.split("```")[1].splitlines()[1:]
    assert len(commands) == 2
    for command in commands:
        words = {"pictures": small_source, "FILE": foreign, "runs/mine": tmp_path / "run"}
        said = pipeline(*(words.get(word, word) for word in command.split()[2:])).done().out
    assert "trained to step 5;" in said
    example = next(words for words, _ in STAGES["train"].examples if "--weights" in words)
    assert example.split()[-4:] == commands[1].split()[-4:]


def test_all_stages_in_one_go_begin_with_a_files_network(small_source: Path, foreign: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = pipeline(
        *("--source", small_source, "--run", run, "--jobs", 1, "--weights", foreign, "--steps", 1),
        *settings("train.lr=0.001", "train.batch_size=4"),
    ).done()
    assert result.out.count("as no --recipe is named") == 1
    assert "learns worse" not in result.out  # the network is not the default one
    assert read_sealed(run / "config.json", "")["network"]["fc_units"] == 250


def test_what_cannot_be_begun_with_is_refused_and_nothing_is_written(
    run: Path, others: Path, checkpoint: Path, tmp_path: Path
) -> None:
    before = sorted(os.listdir(run)), (run / "config.json").read_bytes()
    text = tmp_path / "notes.safetensors"
    text.write_text("no weights")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(checkpoint.read_bytes()[:-4])
    worn, other = tmp_path / "worn.ckpt", tmp_path / "other.ckpt"  # in the weights, and where it says how they compute
    worn.write_bytes(checkpoint.read_bytes()[:-4] + b"\1\2\3\4")
    other.write_bytes(checkpoint.read_bytes().replace(rb"\"lrn_k\": 2.0", rb"\"lrn_k\": 3.0"))
    missing = tmp_path / "missing.ckpt"
    for arguments, pattern in (
        (("--weights", missing), f"{missing}.*choose another file"),
        (("--weights", text), f"cannot begin with {text}: it is damaged or no safetensors file"),
        (("--weights", cut), f"cannot begin with {cut}: it is damaged"),
        (("--weights", worn), f"{worn} is damaged: its contents do not match its checksum"),
        (("--weights", other), f"{other} is damaged: its contents do not match its checksum"),
        (("--weights", others), f"{others} is a folder; --weights takes a file"),
        (
            ("--weights", checkpoint, *settings("network.lrn_k=1.0")),
            r"something else than this run's: network.lrn_k \(2.0 there, 1.0 here\). .*change these with --set",
        ),
        (("--weights", checkpoint, "--recipe", "caffe", *settings(*QUICK)), "begin with --recipe seed"),
    ):
        train(run, *arguments).refused(pattern)
    train(run, set=('train.frozen=["conv6"]',)).refused("train.frozen must name layers")
    train(run, set=(FROZEN.replace("]", ', "fc8"]'),)).refused("train.frozen must name layers, each once and not all")
    assert (sorted(os.listdir(run)), (run / "config.json").read_bytes()) == before
