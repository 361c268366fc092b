"""Export and import through the command line: what goes out comes back, and predicts the same."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import run_pipeline
from net.alexnet import alexnet
from net.layers import Array, Parameters, Run, Shape, _WithoutParameters
from net.weights.layout import to_torch
from net.weights.tensors import read_header, to_bytes
from pipeline.checkpoint import checkpoints, find_checkpoint, load_checkpoint, save_checkpoint
from pipeline.config import RECIPES
from pipeline.config_values import changes
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir, hash_file
from pipeline.settings import Request
from stages import export, import_weights, setup, weights_file
from stages.setup import input_shape, network_layers, shapes
from stages.trained import load_trained
from tests.command_line import QUICK, settings
from tests.net.caffe_files import blob, caffemodel
from tests.net.test_weights import needed


def pipeline(*arguments: object) -> int:
    return run_pipeline.main([str(argument) for argument in arguments])


def arrays(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict: it has no __iter__


@pytest.fixture(scope="module")
def exported(trained_run: Path) -> Iterator[Path]:
    """The run's weights in both safetensors layouts."""
    for format in ("safetensors", "torch"):
        assert pipeline("--stage", "export", "--run", trained_run, "--format", format) == 0
    folder = trained_run / "export"
    yield folder
    for path in folder.iterdir():
        path.unlink()


def test_export_says_what_it_holds(trained_run: Path, exported: Path) -> None:
    header = read_header(exported / "alexnet.safetensors")
    assert header.shapes["conv2.w"] == (5, 5, 48, 256)
    assert json.loads(header.metadata["config"])["recipe"] == "seed"
    assert json.loads(header.metadata["classes"])[3] == {"wnid": "class3", "words": ""}
    torch = read_header(exported / "alexnet.torch.safetensors")
    assert torch.shapes["conv2.weight"] == (256, 48, 5, 5)
    assert torch.shapes["mean"] == (67, 67, 3)
    assert torch.metadata == header.metadata


@pytest.mark.parametrize("name", ["alexnet.safetensors", "alexnet.torch.safetensors"])
def test_import_brings_back_every_bit_and_predicts_the_same(
    name: str,
    trained_run: Path,
    exported: Path,
    small_source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "imported"
    assert pipeline("--stage", "import", exported / name, "--run", run) == 0
    before, after = load_trained(RunDir(trained_run), "latest"), load_trained(RunDir(run), "latest")
    assert after.step == 0
    assert after.header["imported"] == {"file": name, "sha256": hash_file(exported / name)}
    assert after.config == before.config
    assert [entry["wnid"] for entry in after.classes] == [entry["wnid"] for entry in before.classes]
    for parameter, value in before.parameters.items():
        np.testing.assert_array_equal(after.parameters[parameter], value)
    capsys.readouterr()
    picture = small_source / "val" / "class1" / "val1.png"
    for folder in (trained_run, run):
        assert pipeline("--stage", "predict", "--json", "--views", 1, picture, "--run", folder) == 0
    first, second = (json.loads(line)["top"] for line in capsys.readouterr().out.splitlines())
    assert [entry["probability"] for entry in first] == [entry["probability"] for entry in second]
    assert [entry["words"] for entry in first] == [entry["words"] for entry in second]
    checkpoints(run / "train")[0].unlink()  # 80 MB


def test_imported_weights_are_evaluated_where_there_are_validation_pictures_alone(
    trained_run: Path, exported: Path, small_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = tmp_path / "pictures of mine", tmp_path / "run"
    shutil.copytree(small_source / "val", source / "val")
    assert pipeline("--stage", "import", exported / "alexnet.safetensors", "--run", run) == 0
    command = ("--stage", "preprocess", "--source", source, "--run", run, "--jobs", 1)
    assert pipeline(*command) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "has a folder val/ but no train/; add it, or to evaluate only a link in its place: ln -s val " in said
    subprocess.run(said.partition("in its place: ")[2], shell=True, check=True)
    assert pipeline(*command) == 0
    assert pipeline("--stage", "eval", "--run", run, "--views", 10) == 0
    theirs, own = (json.loads((folder / "eval" / "metrics.json").read_text()) for folder in (trained_run, run))
    assert own["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert (own["images"], own["top1"]) == (theirs["images"], theirs["top1"])
    shutil.rmtree(run)


def test_the_recipe_named_comes_before_what_the_file_says(exported: Path, tmp_path: Path) -> None:
    file, quick = exported / "alexnet.safetensors", Request(None, changes(None, list(QUICK), None))
    for recipe, found in ((None, "seed"), ("paper", "paper")):
        run = RunDir(tmp_path / str(recipe))
        import_weights.run(run, file, mean=None, request=replace(quick, recipe=recipe))
        assert load_checkpoint(checkpoints(run.train)[0]).header["config"]["recipe"] == found


def test_training_does_not_go_on_from_imported_weights(
    run: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, whatever is asked for; and what it says is possible is."""
    assert pipeline("--stage", "import", exported / "alexnet.safetensors", "--run", run) == 0
    imported = checkpoints(run / "train")[0]
    said = []
    for arguments in ((), ("--resume",)):
        capsys.readouterr()
        assert pipeline("--stage", "train", "--run", run, "--steps", 1, *arguments) == 1
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert f"error: {imported} holds imported weights, which have no momenta to go on with" in said[0]
    assert f"--stage train --weights {imported} --run DIR" in said[0]
    assert imported.exists()
    assert pipeline("--stage", "eval", "--run", run) == 0
    assert pipeline("--stage", "train", "--run", run, "--steps", 1, "--restart") == 0
    assert checkpoints(run / "train")[0].name == "step-00000001.ckpt"
    assert (run / "train.old-1" / imported.name).exists()


def test_names_of_classes_come_back_with_and_without_words() -> None:
    entries = [{"wnid": "n01", "words": "tench, Tinca tinca"}, {"wnid": "n02", "words": ""}]
    assert weights_file._names(json.dumps(entries), 2) == {
        "wnids": ["n01", "n02"],
        "words": ["tench, Tinca tinca", ""],
    }
    assert weights_file._names(json.dumps([{"wnid": "", "words": ""}] * 2), 2) == {}  # an import without names
    assert weights_file._names(None, 2) == {}


def test_onnx_is_compared_with_this_network(
    trained_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx, onnxruntime = needed("onnx"), needed("onnxruntime")
    assert pipeline("--stage", "export", "--run", trained_run, "--format", "onnx") == 0
    assert "scores of 8 validation pictures differ by at most" in capsys.readouterr().out
    path = trained_run / "export" / "alexnet.onnx"
    # What onnx 1.17 and onnxruntime 1.20, the oldest that pyproject.toml allows, know with room to spare.
    assert onnx.load(path).opset_import[0].version <= 17
    session = onnxruntime.InferenceSession(path)
    trained = load_trained(RunDir(trained_run), "latest")
    inputs = trained.inputs(np.random.default_rng(1).integers(0, 256, (3, 72, 72, 3), dtype=np.uint8), views=1)
    from net import reference

    scores, probabilities = session.run(None, {"crops": inputs["images"]})
    wanted = export._scores(trained, reference, inputs)
    np.testing.assert_allclose(scores, wanted, atol=1e-5 * max(1, np.abs(wanted).max()))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    path.unlink()

    monkeypatch.setattr(export, "agreement", lambda scores, wanted: refused(scores + np.float32(0.01), wanted))
    assert pipeline("--stage", "export", "--run", trained_run, "--format", "onnx") == 1
    assert "differ from this network's by 0.01" in capsys.readouterr().err
    assert not path.exists()


@dataclass(frozen=True)
class Doubled(_WithoutParameters):
    """A layer that somebody has added."""

    def forward(self, ops: ModuleType, parameters: Parameters, x: Array, run: Run) -> tuple[Array, Any]:
        return x + x, None


@dataclass(frozen=True)
class Scaled(Doubled):
    """One with a parameter."""

    like: Shape = ()

    def parameter_shapes(self, shape: Shape) -> dict[str, Shape]:
        return {"scaled.g": self.like}


def test_a_layer_that_somebody_added_is_exported_or_refused_in_a_sentence(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed("onnx")
    needed("onnxruntime")
    saved, run = load_checkpoint(find_checkpoint(trained_run / "train", "latest")), tmp_path / "run"
    monkeypatch.setattr(setup, "alexnet", lambda classes, **how: (*alexnet(classes, **how), Doubled()))
    save_checkpoint(run / "train", 1, saved.header, saved.arrays)
    for format, status in (("safetensors", 0), ("torch", 0), ("onnx", 1)):
        assert pipeline("--stage", "export", "--run", run, "--format", format) == status
    said = capsys.readouterr().err
    assert f"error: cannot export {checkpoints(run / 'train')[0]} with --format onnx: the layer Doubled has no" in said
    for like in ((5,), (5, 5)):  # the second is that of a matrix of weights
        added = Scaled(like)
        monkeypatch.setattr(setup, "alexnet", lambda classes, added=added, **how: (*alexnet(classes, **how), added))
        save_checkpoint(run / "train", 1, saved.header, saved.arrays | {"scaled.g": np.ones(like, np.float32)})
        for format, status in (("safetensors", 0), ("torch", 1), ("onnx", 1)):
            assert pipeline("--stage", "export", "--run", run, "--format", format) == status
        assert capsys.readouterr().err.count("scaled.g has no place in PyTorch's layout yet") == 2
    shutil.rmtree(run)


refused = export.agreement


def test_scores_agree_to_rounding_or_not_at_all() -> None:
    scores = np.array([[1.0, -20.0]], np.float32)
    assert export.agreement(scores, scores + np.float32(1e-4)) == (
        pytest.approx(1e-4, rel=0.1),
        pytest.approx(20, rel=1e-4),
    )
    for wrong in (scores + np.float32(1e-3), scores * np.float32(np.nan), scores + np.float32(np.inf)):
        for pair in ((wrong, scores), (scores, wrong)):
            with pytest.raises(PipelineError, match="differ from this network's"):
                export.agreement(*pair)


def caffe_settings() -> list[str]:
    return [value for value in QUICK if not value.startswith("input.border")]


def test_caffemodel_evaluates_with_its_own_mean(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A caffemodel and a mean image become a checkpoint that --stage eval takes; the mean is the imported one."""
    config = changes(settings=caffe_settings())(RECIPES["caffe"])
    layers = network_layers(config, 5)
    rng = np.random.default_rng(4)
    parameters = {
        name: (rng.standard_normal(shape, dtype=np.float32) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)
        for name, shape in shapes(layers, config).items()
    }
    model, mean = tmp_path / "x.caffemodel", tmp_path / "mean.binaryproto"
    model.write_bytes(caffemodel(to_torch(layers, input_shape(config), parameters), old=True))
    means = rng.uniform(0, 255, (3, 72, 72)).astype(np.float32)
    mean.write_bytes(blob(means, old=True))
    small = settings("input.crop=67", "network.fc_units=250")
    # The run's own configuration says how its pictures are stored; the rest is the caffe recipe.
    arguments = ["--stage", "import", model, "--mean", mean, "--run", run, *small]
    own = (run / "config.json").read_bytes()
    assert pipeline(*arguments) == 0
    assert (run / "config.json").read_bytes() == own
    saved = load_checkpoint(checkpoints(run / "train")[0])
    assert saved.header["config"]["recipe"] == "caffe"
    assert saved.header["config"]["preprocess"]["size"] == 72
    np.testing.assert_array_equal(saved.arrays["mean"], means[::-1].transpose(1, 2, 0))
    for name, value in parameters.items():
        np.testing.assert_array_equal(saved.arrays[name], value)
    assert "--stage preprocess" not in capsys.readouterr().out  # it has its pictures
    losses = []
    assert pipeline("--stage", "eval", "--run", run, "--views", 1) == 0
    losses.append(json.loads((run / "eval" / "metrics.json").read_text())["loss"])
    assert pipeline(*arguments) == 1
    assert "has checkpoints already" in capsys.readouterr().err
    # Without --mean the run's own mean is subtracted, which is another one.
    checkpoints(run / "train")[0].unlink()
    assert pipeline("--stage", "import", model, "--run", run, *small) == 0
    assert pipeline("--stage", "eval", "--run", run, "--views", 1) == 0
    losses.append(json.loads((run / "eval" / "metrics.json").read_text())["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3
    # Without either, what is told is what works: the demo set's mean would be no help.
    capsys.readouterr()
    bare = tmp_path / "bare"
    assert pipeline("--stage", "import", model, "--run", bare, *small, *settings("preprocess.size=72")) == 0
    source, first = f"--run {bare} --source DIR", f"--stage preprocess --source DIR --run {bare}"
    assert f"use it, after {first}, whose mean picture the recipe subtracts, with" in capsys.readouterr().out
    for stage in (("predict", "x.png"), ("eval",)):
        assert pipeline("--stage", *stage, "--run", bare) == 1
        assert f"--stage preprocess {source}" in capsys.readouterr().err


def test_what_cannot_be_imported_is_refused(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"

    def refused(file: Path, *arguments: object) -> str:
        assert pipeline("--stage", "import", file, "--run", run, *arguments) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert not checkpoints(run / "train")
        return error

    whole = exported / "alexnet.safetensors"
    header = read_header(whole)
    assert "there is no file" in refused(tmp_path / "nothing")
    other = tmp_path / "other.safetensors"
    other.write_bytes(whole.read_bytes()[:-1])
    assert "damaged" in refused(other)
    assert "subtracts no mean" in refused(whole, "--mean", write(tmp_path / "m", blob(np.ones((3, 72, 72)))))
    assert "other" not in refused(whole, "--set", "input.crop=72", "--set", "input.border=[20,20]")
    small = {"fc8.b": np.zeros(5, np.float32), "conv1.w": np.zeros((11, 11, 3, 96), np.float32)}
    assert "name its recipe" in refused(write(other, to_bytes(small, {})))
    assert "no array conv1.b" in refused(write(other, to_bytes(small, header.metadata)))
    assert "no array fc8.b" in refused(write(other, to_bytes({"x": small["fc8.b"]}, header.metadata)))
    for config in ("[]", "{", "[" * 100_000, '{"recipe": 7}', '{"recipe": "seed", "input": {"crop": 1e9}}'):
        refused(write(other, to_bytes(small, {"config": config})))
    assert "more than a" not in refused(write(tmp_path / "x.caffemodel", b"\x80\x04\x95pickle"))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_list_of_classes_is_checked(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = read_header(exported / "alexnet.safetensors")
    values = arrays(exported / "alexnet.safetensors")
    path = tmp_path / "x.safetensors"
    for classes in ('[{"wnid": "a", "words": "b"}]', "{}", "[1, 2, 3, 4, 5]", "nonsense"):
        path.write_bytes(to_bytes(values, {**header.metadata, "classes": classes}))
        assert pipeline("--stage", "import", path, "--run", tmp_path / "run") == 1
        assert "classes" in (error := capsys.readouterr().err) or "description of itself" in error


def test_a_wrong_file_is_named_and_leaves_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for missing in (tmp_path / "none.safetensors", tmp_path):
        assert pipeline("--stage", "import", missing, "--run", tmp_path / "new") == 1
        assert f"there is no file {missing}; check the path" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_wrong_mean_image_is_named(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mean = tmp_path / "mean.binaryproto"
    mean.write_bytes(b"no protocol buffer")
    file = exported / "alexnet.torch.safetensors"
    assert pipeline("--stage", "import", file, "--mean", mean, "--run", tmp_path / "new") == 1
    said = capsys.readouterr().err
    assert f"cannot use {mean}: it is damaged" in said
    assert str(file) not in said
    mean.write_bytes(blob(np.ones((3, 50, 50))))
    options = ("--mean", mean, "--set", "input.mean=image", "--run", tmp_path / "new")
    assert pipeline("--stage", "import", file, *options) == 1
    assert f"cannot use {mean}: its mean picture has shape (50, 50, 3), which fits neither" in capsys.readouterr().err
