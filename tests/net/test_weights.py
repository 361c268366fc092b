"""Other people's formats: the same scores after every export, the same arrays after every way back."""

from __future__ import annotations

import functools
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from net import reference
from net.layers import Run
from net.network import Preparation, forward, initial_parameters, prepare
from net.weights import caffe
from net.weights.errors import WeightsError
from net.weights.layout import from_torch, to_torch, torch_shapes
from net.weights.tensors import read_arrays, read_header, to_bytes
from pipeline.config import RECIPES, Config
from pipeline.config_values import changes, to_dict
from stages.setup import input_shape, network_layers, shapes
from tests.net.caffe_files import blob, caffemodel, field, varint

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 10


def needed(name: str):
    """Import a package of the extras; where CI is set its absence is a failure."""
    return __import__(name) if os.environ.get("CI") else pytest.importorskip(name)


def small(recipe: str, *settings: str) -> Config:
    """A recipe on small crops, so that fc6 sees 2 x 2 maps, with weights that make the scores differ."""
    # 99 x 99 with the border: the smallest at which rounding sizes up, as Caffe does, and down agree.
    crop = 99 if recipe == "caffe" else 96
    sizes = [f"input.crop={crop}", "preprocess.size=120", "network.weight_std=[0,0,0,0,0,0,0,0]"]
    return changes(settings=[*sizes, *settings])(RECIPES[recipe])


def parameters_of(config: Config) -> dict[str, np.ndarray]:
    """Initial weights, and biases that are no constants."""
    weights = _weights(config.network.pool_size)
    place = iter(config.network.bias)
    rng = np.random.default_rng(0)
    return {
        name: array if name.endswith(".w") else (next(place) + rng.normal(scale=0.1, size=array.shape)).astype("f4")
        for name, array in weights.items()
    }


@functools.cache
def _weights(pool_size: int) -> dict[str, np.ndarray]:
    config = changes(settings=[f"network.pool_size={pool_size}"])(small("caffe"))
    return initial_parameters(shapes(network_layers(config, CLASSES), config), (0.0,) * 8, (0.0,) * 8, 0)


def preparation_of(config: Config, mean: np.ndarray) -> Preparation:
    inp = config.input
    first = (mean.shape[0] - inp.crop) // 2
    centre = mean[first : first + inp.crop, first : first + inp.crop]
    return Preparation(None if inp.mean == "none" else centre, inp.scale, inp.bgr, inp.border)


def scores_of(config: Config, parameters: dict[str, np.ndarray], mean: np.ndarray, crops: np.ndarray) -> np.ndarray:
    count = len(crops)
    inputs = {
        "images": crops,
        "corner": np.zeros((count, 2), np.int32),
        "flip": np.zeros(count, np.uint8),
        "shift": np.zeros((count, 3), np.float32),
    }
    x = prepare(reference, preparation_of(config, mean), inputs)
    return forward(reference, network_layers(config, CLASSES), parameters, x, Run(training=False))[0]


@pytest.fixture(scope="module")
def crops(ilsvrc_mini: Path) -> np.ndarray:
    """Three real pictures, uint8 (3, 99, 99, 3)."""
    import io
    import tarfile

    pictures = []
    with tarfile.open(ilsvrc_mini / "ILSVRC2012_img_val.tar") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                picture = Image.open(io.BytesIO(file.read())).convert("RGB").resize((99, 99))
                pictures.append(np.asarray(picture))
            if len(pictures) == 3:
                return np.stack(pictures)
    raise AssertionError("too few pictures")


MEAN = np.random.default_rng(5).uniform(80, 140, (120, 120, 3)).astype(np.float32)
# Every recipe, with the points where a port goes wrong made visible: LRN at alpha = 1, and no LRN.
CONFIGS = {
    "seed, strong LRN": small("seed", "network.lrn_alpha=1.0"),
    "paper, no LRN": small("paper", "network.lrn_size=0"),
    "original, strong LRN": small("original", "network.lrn_alpha=1.0", "input.scale=0.02"),
    "caffe": small("caffe"),
}


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    assert np.abs(wanted).max() > 0.01
    assert np.abs(got - wanted).max() <= 1e-5 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_onnx_gives_the_same_scores_on_real_pictures(name: str, crops: np.ndarray) -> None:
    needed("onnx")
    onnxruntime = needed("onnxruntime")
    from net.weights.onnx_graph import onnx_model

    config = CONFIGS[name]
    crops = np.ascontiguousarray(crops[:, : config.input.crop, : config.input.crop])
    parameters = parameters_of(config)
    mean = None if config.input.mean == "none" else MEAN
    prepared = Preparation(mean, config.input.scale, config.input.bgr, config.input.border)
    layers = network_layers(config, CLASSES)
    model = onnx_model(layers, parameters, prepared, config.input.crop, {"classes": "[]"})
    session = onnxruntime.InferenceSession(model.SerializeToString())
    scores, probabilities = session.run(None, {"crops": crops})
    wanted = scores_of(config, parameters, MEAN, crops)
    close(scores, wanted)
    np.testing.assert_allclose(probabilities, reference.softmax(wanted), atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_module_in_the_docs_gives_the_same_scores(name: str, crops: np.ndarray, tmp_path: Path) -> None:
    torch = needed("torch")
    text = (ROOT / "docs" / "formats.md").read_text()
    code = re.search(r"<!-- torch module -->\n```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    module: dict = {}
    exec(code[1], module)  # noqa: S102  the documentation's own code is what is tested

    config = CONFIGS[name]
    crops = np.ascontiguousarray(crops[:, : config.input.crop, : config.input.crop])
    parameters = parameters_of(config)
    tensors = to_torch(network_layers(config, CLASSES), input_shape(config), parameters)
    mean = preparation_of(config, MEAN).mean
    crop = config.input.crop
    tensors["mean"] = np.zeros((crop, crop, 3), np.float32) if mean is None else np.ascontiguousarray(mean)
    path = tmp_path / "alexnet.torch.safetensors"
    path.write_bytes(to_bytes(tensors, {"config": json.dumps(to_dict(config))}))
    with torch.no_grad():
        scores = module["load"](path)(torch.from_numpy(crops)).numpy()
    close(scores, scores_of(config, parameters, MEAN, crops))


@pytest.mark.parametrize("recipe", ["seed", "caffe"])
def test_way_to_pytorch_and_back_keeps_every_bit(recipe: str) -> None:
    config = small(recipe)
    layers, parameters = network_layers(config, CLASSES), parameters_of(config)
    tensors = to_torch(layers, input_shape(config), parameters)
    assert {name: array.shape for name, array in tensors.items()} == torch_shapes(layers, input_shape(config))
    assert tensors["conv2.weight"].shape == (256, 48, 5, 5)
    # fc6's input in PyTorch's order: channel 7, row 1, column 0 of (256, 2, 2) maps.
    assert tensors["fc6.weight"][3, (7 * 2 + 1) * 2 + 0] == parameters["fc6.w"][(1 * 2 + 0) * 256 + 7, 3]
    back = from_torch(layers, input_shape(config), tensors)
    for name, array in parameters.items():
        np.testing.assert_array_equal(back[name], array)


def test_safetensors_way_back_keeps_every_bit(tmp_path: Path) -> None:
    config = small("seed")
    parameters = parameters_of(config)
    path = tmp_path / "alexnet.safetensors"
    path.write_bytes(to_bytes(parameters, {"config": "{}"}))
    assert read_header(path).metadata == {"config": "{}"}
    back = read_arrays(path, shapes(network_layers(config, CLASSES), config))
    assert back.keys() == parameters.keys()
    for name, array in parameters.items():
        np.testing.assert_array_equal(back[name], array)


def test_safetensors_of_another_network_is_refused_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    good = {"a.w": np.ones((2, 3), np.float32), "a.b": np.zeros(3, np.float32)}
    wanted = {"a.w": (2, 3), "a.b": (3,)}
    for arrays, message in [
        ({"a.w": good["a.w"]}, "no array a.b"),
        ({**good, "a.w": np.ones((3, 2), np.float32)}, "shape 3x2, this network's is 2x3"),
        ({**good, "extra": np.ones(1, np.float32)}, "'extra'"),
        ({**good, "a.b": np.zeros(3, np.int32)}, "type I32"),
        ({**good, "a.b": np.array([0, np.nan, 0], np.float32)}, "not finite"),
    ]:
        path.write_bytes(to_bytes(arrays, {}))
        with pytest.raises(WeightsError, match=message):
            read_arrays(path, wanted)
    whole = to_bytes(good, {})
    for damaged in (b"", b"\x80\x04pickle", whole[:-1], whole[:20], struct.pack("<Q", 2**62) + whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(WeightsError):
            read_arrays(path, wanted)


def read_caffe(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return caffe.read_arrays(caffe.read_blobs(path), expected)


def test_caffemodel_with_the_real_shapes(tmp_path: Path) -> None:
    config = RECIPES["caffe"]
    layers = network_layers(config, 1000)
    rng = np.random.default_rng(3)
    wanted = torch_shapes(layers, input_shape(config))
    tensors = {name: rng.random(shape, dtype=np.float32) for name, shape in wanted.items()}
    path = tmp_path / "bvlc_alexnet.caffemodel"
    path.write_bytes(caffemodel(tensors, old=True))
    assert 243e6 < path.stat().st_size < 245e6  # as the published file
    read = read_caffe(path, torch_shapes(layers, input_shape(config)))
    for name, array in tensors.items():
        np.testing.assert_array_equal(read[name], array)
    parameters = from_torch(layers, input_shape(config), read)
    # Input channel 0 of conv1 is blue in Caffe and, since the recipe feeds blue, green, red, here as well.
    np.testing.assert_array_equal(parameters["conv1.w"][2, 5, 0], tensors["conv1.weight"][:, 0, 2, 5])
    # fc6: channel, row, column there, row, column, channel here.
    at_caffe, at_here = (200 * 6 + 4) * 6 + 1, (4 * 6 + 1) * 256 + 200
    np.testing.assert_array_equal(parameters["fc6.w"][at_here], tensors["fc6.weight"][:, at_caffe])


def caffe_scores(tensors: dict[str, np.ndarray], mean: np.ndarray, crops: np.ndarray) -> np.ndarray:
    """bvlc_alexnet written down once more, in PyTorch: blue, green, red; LRN with alpha / n and k = 1."""
    torch = needed("torch")
    F = torch.nn.functional
    t = {name: torch.from_numpy(array) for name, array in tensors.items()}
    x = torch.from_numpy((crops.astype(np.float32) - mean)[..., ::-1].transpose(0, 3, 1, 2).copy())
    x = F.relu(F.conv2d(x, t["conv1.weight"], t["conv1.bias"], stride=4))
    x = F.max_pool2d(F.local_response_norm(x, 5, 1e-4, 0.75, 1.0), 3, 2, ceil_mode=True)
    x = F.relu(F.conv2d(x, t["conv2.weight"], t["conv2.bias"], padding=2, groups=2))
    x = F.max_pool2d(F.local_response_norm(x, 5, 1e-4, 0.75, 1.0), 3, 2, ceil_mode=True)
    x = F.relu(F.conv2d(x, t["conv3.weight"], t["conv3.bias"], padding=1))
    x = F.relu(F.conv2d(x, t["conv4.weight"], t["conv4.bias"], padding=1, groups=2))
    x = F.relu(F.conv2d(x, t["conv5.weight"], t["conv5.bias"], padding=1, groups=2))
    x = F.max_pool2d(x, 3, 2, ceil_mode=True).flatten(1)
    x = F.relu(F.linear(x, t["fc6.weight"], t["fc6.bias"]))
    x = F.relu(F.linear(x, t["fc7.weight"], t["fc7.bias"]))
    return F.linear(x, t["fc8.weight"], t["fc8.bias"]).numpy()


@pytest.mark.parametrize("old", [True, False])
def test_caffemodel_gives_caffes_scores(crops: np.ndarray, tmp_path: Path, old: bool) -> None:
    config = small("caffe")
    layers = network_layers(config, CLASSES)
    tensors = to_torch(layers, input_shape(config), parameters_of(config))
    # conv1 as it comes from a network trained on blue, green, red: what counts is that scores agree, not the order.
    path = tmp_path / "x.caffemodel"
    path.write_bytes(caffemodel(tensors, old=old))
    parameters = from_torch(layers, input_shape(config), read_caffe(path, torch_shapes(layers, input_shape(config))))
    mean = preparation_of(config, MEAN).mean
    assert mean is not None
    close(scores_of(config, parameters, MEAN, crops), caffe_scores(tensors, mean, crops))


def test_caffe_mean_image(tmp_path: Path) -> None:
    mean = np.random.default_rng(2).uniform(0, 255, (9, 8, 3)).astype(np.float32)
    path = tmp_path / "mean.binaryproto"
    bgr = np.ascontiguousarray(mean[..., ::-1].transpose(2, 0, 1))
    for data in (blob(bgr, old=True), blob(bgr), blob(bgr[None], double=True)):
        path.write_bytes(data)
        np.testing.assert_array_equal(caffe.read_mean(path), mean)
    path.write_bytes(blob(mean))
    with pytest.raises(WeightsError, match="not a mean image"):
        caffe.read_mean(path)
    path.write_bytes(field(1, 1) + field(2, 3))  # three channels of nothing, as fuzzing found it
    with pytest.raises(WeightsError, match=r"shape \(1, 3, 0, 0\) comes with 0 bytes"):
        caffe.read_mean(path)


TINY = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.array([1, 2], dtype=np.float32)}
TINY_SHAPES = {"a.weight": (2, 3), "a.bias": (2,)}


def tiny(first: bytes, second: bytes = b"") -> bytes:
    return field(
        100, field(1, "a") + field(2, "InnerProduct") + field(7, first) + (field(7, second) if second else b"")
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no array a.weight"),
        (b"\x80\x04\x95pickle", "damaged|cut short"),
        (b"\x93NUMPY" + bytes(40), "damaged|cut short"),
        (tiny(blob(TINY["a.weight"])), "no array a.bias"),
        (tiny(blob(TINY["a.weight"].T.copy()), blob(TINY["a.bias"])), "shape 3x2"),
        (tiny(blob(TINY["a.weight"]), field(7, field(1, varint(2**40))) + field(5, b"1234")), "comes with 4 bytes"),
        (tiny(blob(TINY["a.weight"]), field(1, 2) + field(5, bytes(9))), "comes with 9 bytes"),
        (tiny(field(7, field(1, b"\x01" * 40)) + field(5, bytes(4))), "more than 8 axes"),
        (tiny(field(5, 1)), "not packed"),
        (b"".join([field(100, b"")] * 1001), "more than 1000 layers"),
        (field(100, field(1, "a") + field(7, b"") * 17), "comes with 0 bytes|more than 16 arrays"),
        (tiny(blob(TINY["a.weight"]), blob(np.array([1, np.inf], np.float32))), "not finite"),
        (b"\xff" * 11, "more than ten bytes"),
    ],
)
def test_damaged_or_hostile_caffemodel_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.caffemodel"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=message):
        read_caffe(path, TINY_SHAPES)


def test_every_cut_of_a_caffemodel_is_refused_or_incomplete(tmp_path: Path) -> None:
    whole = tiny(blob(TINY["a.weight"]), blob(TINY["a.bias"]))
    path = tmp_path / "x.caffemodel"
    path.write_bytes(whole)
    for name, array in read_caffe(path, TINY_SHAPES).items():
        np.testing.assert_array_equal(array, TINY[name])
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(WeightsError):
            read_caffe(path, TINY_SHAPES)


def test_caffenet_and_oversized_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("caffe")
    layers = network_layers(config, CLASSES)
    tensors = to_torch(layers, input_shape(config), parameters_of(config))
    path = tmp_path / "caffenet.caffemodel"
    path.write_bytes(caffemodel(tensors, old=False, order=("pool1", "norm1")))
    with pytest.raises(WeightsError, match="pools before it normalises"):
        read_caffe(path, torch_shapes(layers, input_shape(config)))
    monkeypatch.setattr(caffe, "LARGEST", 1000)
    with pytest.raises(WeightsError, match="more than a protocol buffer"):
        read_caffe(path, torch_shapes(layers, input_shape(config)))
