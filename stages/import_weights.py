"""Import: weights from elsewhere become a run directory's checkpoint (``docs/formats.md``)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from net.layers import Shape
from net.weights import caffe, tensors
from net.weights.errors import WeightsError
from net.weights.layout import from_torch, torch_shapes
from pipeline.checkpoint import checkpoints, save_checkpoint
from pipeline.config import Config, load_config
from pipeline.config_values import from_dict, to_dict
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir, hash_file, read_sealed, write_sealed
from pipeline.settings import Request
from stages.setup import MEAN, input_shape, network_layers, shapes

CAFFE_SUFFIX: Final = ".caffemodel"
MOST_CLASSES: Final = 100_000


def run(run_dir: RunDir, file: Path, *, mean: Path | None, request: Request) -> Path:
    """Write the weights in ``file`` as checkpoint 0 of the run and return its path.

    Parameters
    ----------
    file : a safetensors file in this project's or PyTorch's layout, or a ``.caffemodel``
    mean : Caffe's mean image (``.binaryproto``), to be subtracted instead of the run's own
    request : the network's recipe, where None is what the file says, or ``caffe`` for a caffemodel; and changes to it

    Raises
    ------
    PipelineError
        The file is damaged, unreadable or of another network; the run has checkpoints already.
    """
    if checkpoints(run_dir.train):
        raise PipelineError(f"{run_dir.train} has checkpoints already; import into a new run with --run")
    try:
        read = _read_caffemodel if file.suffix == CAFFE_SUFFIX else _read_safetensors
        config, arrays, classes = read(
            file, request.recipe, lambda config: request.change(_with_stored_pictures(config, run_dir))
        )
        if mean is not None:
            arrays[MEAN] = _read_mean(mean)
        _check_mean(arrays.get(MEAN), config)
        digest = hash_file(file)
    except WeightsError as error:
        raise PipelineError(f"cannot import {file}: {error} (safetensors and {CAFFE_SUFFIX} files can be)") from error
    except OSError as error:
        raise PipelineError(f"cannot read {error.filename or file}: {error.strerror or error}") from error
    header = {
        "schema": 1,
        "config": to_dict(config),
        "classes": len(arrays["fc8.b"]),
        "validation": None,
        "imported": {"file": file.name, "sha256": digest},
        **classes,
    }
    path = save_checkpoint(run_dir.train, 0, header, arrays)
    if not run_dir.config.exists():
        write_sealed(run_dir.config, to_dict(config))
    lacks_mean = config.input.mean != "none" and MEAN not in arrays and not (run_dir.preprocess / "mean.npy").exists()
    pictures = f"--stage preprocess --source DIR {run_dir.flag}"
    print(
        f"imported {file.name}, {len(arrays['fc8.b'])} classes, recipe {config.recipe}, as {path}; use it"
        + (f", after {pictures}, whose mean picture the recipe subtracts," if lacks_mean else "")
        + f" with\n  python run_pipeline.py --stage predict IMAGE... {run_dir.flag}\n"
        + ("or with\n" if lacks_mean else f"or, after {pictures}, with\n")
        + f"  python run_pipeline.py --stage eval {run_dir.flag}"
    )
    return path


def _read_mean(file: Path) -> np.ndarray:
    try:
        return caffe.read_mean(file)
    except WeightsError as error:
        raise PipelineError(
            f"cannot use {file}: {error} (--mean takes Caffe's mean image, a .binaryproto file)"
        ) from error


def _read_caffemodel(
    file: Path, recipe: str | None, change: Callable[[Config], Config]
) -> tuple[Config, dict[str, np.ndarray], dict[str, Any]]:
    config = change(load_config(recipe or "caffe"))
    blobs = caffe.read_blobs(file)
    layers = network_layers(config, _classes({name: blob.shape for name, blob in blobs.items()}, "fc8.bias"))
    shape = input_shape(config)
    found = caffe.read_arrays(blobs, torch_shapes(layers, shape))
    return config, from_torch(layers, shape, found), {}


def _read_safetensors(
    file: Path, recipe: str | None, change: Callable[[Config], Config]
) -> tuple[Config, dict[str, np.ndarray], dict[str, Any]]:
    """Both layouts; the names tell which it is."""
    header = tensors.read_header(file)
    if recipe is not None:
        config = load_config(recipe)
    elif "config" in header.metadata:
        config = from_dict(_json(header.metadata["config"], dict), str(file))
    else:
        raise PipelineError(f"{file} does not say which network it is; name its recipe with --recipe")
    config = change(config)
    foreign = "fc8.bias" in header.shapes
    layers = network_layers(config, _classes(header.shapes, "fc8.bias" if foreign else "fc8.b"))
    shape = input_shape(config)
    expected = torch_shapes(layers, shape) if foreign else shapes(layers, config)
    if MEAN in header.shapes:
        expected[MEAN] = _mean_shape(header.shapes[MEAN], config)
    arrays = tensors.read_arrays(file, expected)
    mean = {MEAN: arrays.pop(MEAN)} if MEAN in arrays and config.input.mean != "none" else {}
    arrays.pop(MEAN, None)
    classes = _names(header.metadata.get("classes"), len(arrays["fc8.bias" if foreign else "fc8.b"]))
    return config, {**(from_torch(layers, shape, arrays) if foreign else arrays), **mean}, classes


def _with_stored_pictures(config: Config, run_dir: RunDir) -> Config:
    """The configuration, with the run's own rule for stored pictures where it has one."""
    if not run_dir.config.exists():
        return config
    own = from_dict(read_sealed(run_dir.config, "import into a new run with --run"), str(run_dir.config))
    return replace(config, preprocess=own.preprocess)


def _classes(found: dict[str, Shape], name: str) -> int:
    """The number of classes, from the last layer's bias."""
    size = int(np.prod(found.get(name, (0,)), dtype=object))
    if not 1 <= size <= MOST_CLASSES:
        raise WeightsError(
            f"it has no array {name}, or of an impossible size; this is no AlexNet with layers like ours"
        )
    return size


def _mean_shape(found: Shape, config: Config) -> Shape:
    for side in (config.preprocess.size, config.input.crop):
        if found == (side, side, 3):
            return found
    raise WeightsError(
        f"its mean picture has shape {found}, which fits neither the stored pictures ({config.preprocess.size}) "
        f"nor the crops ({config.input.crop})"
    )


def _check_mean(mean: np.ndarray | None, config: Config) -> None:
    if mean is not None:
        if config.input.mean == "none":
            raise PipelineError(f"the recipe {config.recipe} subtracts no mean; leave out --mean")
        _mean_shape(mean.shape, config)


def _names(text: str | None, count: int) -> dict[str, Any]:
    """The class names a file brings, as the checkpoint's header holds them."""
    if text is None:
        return {}
    entries = _json(text, list)
    if len(entries) != count or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("wnid", "words"))
        for entry in entries
    ):
        raise WeightsError("its list of classes does not fit its last layer")
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
