"""Export: a checkpoint as safetensors, in PyTorch's layout, or as an ONNX model (``docs/formats.md``)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np

from data.manifest import read_manifest
from data.split import open_split
from net.layers import Run, fuse
from net.network import forward, prepare
from net.weights.errors import WeightsError
from net.weights.layout import to_torch
from net.weights.tensors import to_bytes
from pipeline.config_values import to_dict
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir, make_folder, write_bytes
from stages.setup import MEAN, centre, input_shape
from stages.trained import Trained, load_trained

FILES: Final = {
    "safetensors": "alexnet.safetensors",
    "torch": "alexnet.torch.safetensors",
    "onnx": "alexnet.onnx",
}
TOLERANCE: Final = 1e-5  # of the largest score, between this network and the exported one
_PICTURES: Final = 8  # that an ONNX model is compared on


def run(run_dir: RunDir, ops: ModuleType, *, checkpoint: str, format: str) -> Path:
    """Write ``<run>/export/<name>`` and return its path.

    Raises
    ------
    PipelineError
        No usable checkpoint; a package is missing; the format has no form for a layer; an ONNX model does not give this
        network's scores.
    """
    trained = load_trained(run_dir, checkpoint)
    metadata = {
        "config": json.dumps(to_dict(trained.config)),
        # Class folders have no words of their own: null in classes.json, no text here.
        "classes": json.dumps([{key: entry.get(key) or "" for key in ("wnid", "words")} for entry in trained.classes]),
    }
    note = ""
    try:
        if format == "onnx":
            data, note = _onnx(trained, run_dir, ops, metadata)
        elif format == "torch":
            data = to_bytes(_torch(trained), metadata)
        else:
            mean = {} if trained.mean is None else {MEAN: trained.mean}
            data = to_bytes({**trained.parameters, **mean}, metadata)
    except WeightsError as error:  # a network that somebody has changed
        raise PipelineError(
            f"cannot export {trained.path} with --format {format}: {error} (--format safetensors takes any layer)"
        ) from error
    path = make_folder(run_dir.root / "export") / FILES[format]
    write_bytes(path, data)
    print(f"exported {trained.path.name} to {path} ({len(data) / 1e6:.0f} MB){note}")
    return path


def _torch(trained: Trained) -> dict[str, np.ndarray]:
    tensors = to_torch(trained.layers, input_shape(trained.config), trained.parameters)
    crop = trained.config.input.crop
    # What is subtracted from a centre crop: other programs cut no other.
    mean = np.zeros((crop, crop, 3), np.float32) if trained.mean is None else centre(trained.mean, crop)
    return {**tensors, MEAN: mean}


def _onnx(trained: Trained, run_dir: RunDir, ops: ModuleType, metadata: dict[str, str]) -> tuple[bytes, str]:
    """The model's bytes, after onnxruntime has given this network's scores with them."""
    try:
        import onnxruntime

        from net.weights.onnx_graph import onnx_model
    except ImportError as error:
        raise PipelineError(f"the ONNX export needs the package {error.name}: pip install '.[export]'") from error
    from net import reference

    crop = trained.config.input.crop
    data = onnx_model(
        trained.layers, trained.parameters, trained.preparation(reference), crop, metadata
    ).SerializeToString()
    inputs, which = _inputs(run_dir, trained)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    scores, _ = session.run(None, {"crops": inputs["images"]})
    difference, largest = agreement(scores, _scores(trained, ops, inputs))
    return data, f"; onnxruntime's scores of {which} differ by at most {difference:.1e} (largest {largest:.3g})"


def agreement(scores: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """The largest difference between onnxruntime's scores and this network's, and the largest score.

    Raises
    ------
    PipelineError
        They differ by more than rounding, or a number is not finite.
    """
    difference, largest = float(np.abs(scores - wanted).max()), float(np.abs(wanted).max())
    if not (math.isfinite(largest) and difference <= TOLERANCE * max(1.0, largest)):
        raise PipelineError(
            f"onnxruntime's scores differ from this network's by {difference:.2g} (the largest is {largest:.3g}); "
            "nothing was written. Try --device reference; if that fails too, please report it"
        )
    return difference, largest


def _inputs(run_dir: RunDir, trained: Trained) -> tuple[dict[str, np.ndarray], str]:
    """Centre views to compare on: of validation pictures, or noise where there are no shards."""
    size, crop = trained.config.preprocess.size, trained.config.input.crop
    if not (run_dir.preprocess / "manifest.json").exists():
        noise = np.random.default_rng(0).integers(0, 256, (2, crop, crop, 3), dtype=np.uint8)
        nothing = [np.zeros((size, size, 3), np.uint8)] * 2
        return {**trained.inputs(nothing, views=1), "images": noise}, "2 pictures of noise"
    split = open_split(run_dir.preprocess, read_manifest(run_dir), "val")
    count = min(_PICTURES, len(split))
    squares = [split.row(index) for index in range(count)]
    return trained.inputs(squares, views=1), f"{count} validation pictures"


def _scores(trained: Trained, ops: ModuleType, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """This network's scores of prepared views, float32 (N, classes)."""
    x = prepare(ops, trained.preparation(ops), ops.upload(inputs))
    scores, _ = forward(ops, fuse(trained.layers, ops), trained.on_device(ops), x, Run(training=False))
    return ops.to_host(scores)
