"""Weights from a file: checkpoints, safetensors in two layouts, Caffe's caffemodel (``docs/formats.md``)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from net.layers import Shape
from net.weights import caffe, tensors
from net.weights.errors import WeightsError
from net.weights.layout import check_shapes, from_torch, torch_shapes
from pipeline.checkpoint import Arrays, load_checkpoint
from pipeline.config import Config, load_config
from pipeline.config_values import from_dict
from stages.setup import MEAN, input_shape, network_layers, parameters_of, shapes

CAFFE_SUFFIX: Final = ".caffemodel"
CHECKPOINT_SUFFIX: Final = ".ckpt"
MOST_CLASSES: Final = 100_000
FORMS: Final = f"safetensors, {CHECKPOINT_SUFFIX} and {CAFFE_SUFFIX} files"  # for messages

_CAFFE: Final = "caffe"  # the recipe of every caffemodel that can be read
_OTHER_CLASSES: Final = "its list of classes does not fit its last layer"

# From the configuration that a file names, None where it names none, to that of the network to read
Choose = Callable[[Config | None], Config]


@dataclass(frozen=True)
class Weights:
    """What a file holds: the parameters of a network, perhaps its mean picture, and what it says of itself.

    ``classes`` has the lists ``wnids`` and ``words`` in the order of the scores, as far as the file names them.
    """

    config: Config  # of the network they are read as
    parameters: Arrays
    mean: np.ndarray | None
    classes: dict[str, list[str]]


def read_weights(file: Path, choose: Choose) -> Weights:
    """Read a file whose form its name tells, or for safetensors the names in it.

    Raises
    ------
    WeightsError
        It is damaged or of another network than ``choose`` settles on.
    PipelineError
        It is a checkpoint, and damaged; its configuration cannot be used; what ``choose`` raises.
    OSError
    """
    if file.suffix == CHECKPOINT_SUFFIX:
        return _read_checkpoint(file, choose)
    if file.suffix == CAFFE_SUFFIX:
        return _read_caffemodel(file, choose)
    return _read_safetensors(file, choose)


def read_config(file: Path) -> Config | None:
    """The configuration of the network in a file; None where it names none.

    Of a checkpoint too only the header is read, half a gigabyte being a lot to read twice, and its checksum is not
    compared: :func:`read_weights` does that.

    Raises
    ------
    WeightsError
        It is damaged.
    PipelineError
        Its configuration cannot be used.
    OSError
    """
    if file.suffix == CAFFE_SUFFIX:
        file.stat()  # nothing else here would notice that it is missing
        return load_config(_CAFFE)
    if file.suffix == CHECKPOINT_SUFFIX:
        return _config_of_checkpoint(_json(tensors.read_header(file).metadata.get("header", "{}"), dict), file)
    return _config(tensors.read_header(file).metadata, file)


def _config_of_checkpoint(header: dict[str, Any], file: Path) -> Config | None:
    values = header.get("config")
    return from_dict(values, str(file)) if isinstance(values, dict) else None


def _config(metadata: dict[str, str], file: Path) -> Config | None:
    text = metadata.get("config")
    return None if text is None else from_dict(_json(text, dict), str(file))


def _read_checkpoint(file: Path, choose: Choose) -> Weights:
    saved = load_checkpoint(file, "choose another file")
    config = choose(_config_of_checkpoint(saved.header, file))
    parameters = parameters_of(saved.arrays)
    found = {name: array.shape for name, array in parameters.items()}
    layers = network_layers(config, _classes(found, "fc8.b"))
    check_shapes(found, shapes(layers, config))
    classes = {key: saved.header[key] for key in ("wnids", "words") if saved.header.get(key) is not None}
    count = len(parameters["fc8.b"])
    for names in classes.values():
        if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
            raise WeightsError(_OTHER_CLASSES)
    mean = saved.arrays.get(MEAN)
    if mean is not None:
        require_mean_shape(mean.shape, config)
    return Weights(config, parameters, mean, classes)


def _read_caffemodel(file: Path, choose: Choose) -> Weights:
    config = choose(load_config(_CAFFE))
    blobs = caffe.read_blobs(file)
    layers = network_layers(config, _classes({name: blob.shape for name, blob in blobs.items()}, "fc8.bias"))
    shape = input_shape(config)
    found = caffe.read_arrays(blobs, torch_shapes(layers, shape))
    return Weights(config, from_torch(layers, shape, found), None, {})


def _read_safetensors(file: Path, choose: Choose) -> Weights:
    """Both layouts; the names tell which it is."""
    header = tensors.read_header(file)
    config = choose(_config(header.metadata, file))
    foreign = "fc8.bias" in header.shapes
    layers = network_layers(config, _classes(header.shapes, "fc8.bias" if foreign else "fc8.b"))
    shape = input_shape(config)
    expected = torch_shapes(layers, shape) if foreign else shapes(layers, config)
    if MEAN in header.shapes:
        expected[MEAN] = require_mean_shape(header.shapes[MEAN], config)
    arrays = tensors.read_arrays(file, expected)
    mean = arrays.pop(MEAN, None)
    parameters = from_torch(layers, shape, arrays) if foreign else arrays
    classes = _names(header.metadata.get("classes"), len(parameters["fc8.b"]))
    return Weights(config, parameters, mean, classes)


def _classes(found: dict[str, Shape], name: str) -> int:
    """The number of classes, from the last layer's bias."""
    size = int(np.prod(found.get(name, (0,)), dtype=object))
    if not 1 <= size <= MOST_CLASSES:
        raise WeightsError(
            f"it has no array {name}, or of an impossible size; this is no AlexNet with layers like ours"
        )
    return size


def require_mean_shape(found: Shape, config: Config) -> Shape:
    """The shape of a mean picture, which must be that of the stored pictures or of the crops."""
    for side in (config.preprocess.size, config.input.crop):
        if found == (side, side, 3):
            return found
    raise WeightsError(
        f"its mean picture has shape {found}, which fits neither the stored pictures ({config.preprocess.size}) "
        f"nor the crops ({config.input.crop})"
    )


def _names(text: str | None, count: int) -> dict[str, list[str]]:
    """The class names that a safetensors file brings."""
    if text is None:
        return {}
    entries = _json(text, list)
    if len(entries) != count or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("wnid", "words"))
        for entry in entries
    ):
        raise WeightsError(_OTHER_CLASSES)
    if not all(entry["wnid"] for entry in entries):
        return {}
    return {"wnids": [entry["wnid"] for entry in entries], "words": [entry["words"] for entry in entries]}


def _json(text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError("its description of itself is damaged (not valid JSON)") from error
    if not isinstance(value, kind):
        raise WeightsError("its description of itself is damaged")
    return value
