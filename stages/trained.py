"""A checkpoint with all that is needed to use it: configuration, layers, parameters, mean picture, class names.

Unlike ``stages.setup.open_dataset`` this asks for no shards: a checkpoint that was imported, or whose shards have been
removed, can still predict and be exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from data.manifest import require_sound_description
from data.sampling import view_crops
from data.shards import preprocess_command
from net.layers import Layer, Parameters
from net.network import Preparation
from pipeline.checkpoint import Arrays, find_checkpoint, load_checkpoint
from pipeline.config import Config, from_dict
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir
from stages.setup import (
    MEAN,
    MOMENTUM,
    network_layers,
    parameter_names,
    preparation,
    read_classes,
    read_mean,
    shapes,
)


@dataclass(frozen=True)
class Trained:
    """A network that has been trained, on the host.

    ``layers`` are plain (not fused); ``momenta`` is empty for an imported network; ``mean`` is float32 (M, M, 3),
    None where the recipe subtracts none. Each entry of ``classes`` has ``wnid`` and ``words``, in the order of the
    scores.
    """

    path: Path
    step: int
    seal: str
    header: dict[str, Any]
    config: Config
    classes: list[dict[str, Any]]
    layers: tuple[Layer, ...]
    parameters: Arrays
    momenta: Arrays
    mean: np.ndarray | None

    def preparation(self, ops: ModuleType) -> Preparation:
        """How crops become input outside of training."""
        mean = np.zeros((0, 0, 3), np.float32) if self.mean is None else self.mean  # not looked at when it is None
        return preparation(self.config, mean, ops, jittered=False)

    def on_device(self, ops: ModuleType) -> Parameters:
        """The parameters as arrays of the backend."""
        return {name: ops.asarray(value) for name, value in self.parameters.items()}

    def inputs(self, squares: Sequence[np.ndarray], views: int) -> dict[str, np.ndarray]:
        """The views of stored squares, uint8 (size, size, 3), as host arrays for ``net.network.prepare``."""
        crop = self.config.input.crop
        crops = view_crops(0, len(squares), views, squares[0].shape[0], crop)
        cut = [
            squares[index][row : row + crop, column : column + crop]
            for index, (row, column) in zip(crops.index.tolist(), crops.corner.tolist(), strict=True)
        ]
        return {"images": np.stack(cut), "corner": crops.corner, "flip": crops.flip, "shift": crops.shift}

    def label(self, number: int) -> str:
        """The class as a person knows it: its first word, else its WordNet ID, else its number."""
        return label(self.classes[number], number)


def label(entry: dict[str, Any], number: int) -> str:
    words = str(entry.get("words") or "").split(",")[0].strip()
    return words or str(entry.get("wnid") or f"class {number}")


def load_trained(run_dir: RunDir, checkpoint: str) -> Trained:
    """Read the checkpoint that ``latest``, ``best`` or a path stands for.

    Raises
    ------
    PipelineError
        It is missing or damaged, does not fit its own configuration, or belongs to other classes than the run's.
    """
    saved = load_checkpoint(find_checkpoint(run_dir.train, checkpoint))
    values, count = saved.header.get("config"), saved.header.get("classes")
    if not isinstance(values, dict) or not isinstance(count, int):
        raise PipelineError(f"{saved.path} holds no configuration; choose a checkpoint written by --stage train")
    config = from_dict(values, str(saved.path))
    layers = network_layers(config, count)
    parameters = {name: saved.arrays[name] for name in parameter_names(saved.arrays)}
    if {name: array.shape for name, array in parameters.items()} != shapes(layers, config):
        raise PipelineError(f"{saved.path} holds other arrays than its configuration says; choose another checkpoint")
    momenta = {n.removeprefix(MOMENTUM): a for n, a in saved.arrays.items() if n.startswith(MOMENTUM)}
    return Trained(
        path=saved.path,
        step=saved.header["step"],
        seal=saved.seal,
        header=saved.header,
        config=config,
        classes=_classes(run_dir, saved.path, saved.header, count),
        layers=layers,
        parameters=parameters,
        momenta=momenta,
        mean=None if config.input.mean == "none" else _mean(run_dir, saved.arrays.get(MEAN), config),
    )


def _classes(run_dir: RunDir, path: Path, header: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The run's class names, where they are those of the checkpoint; else what the checkpoint itself knows."""
    wnids = header.get("wnids")
    listed = run_dir.preprocess / "classes.json"
    if listed.exists():
        require_sound_description(run_dir, listed.name)
        classes = read_classes(listed, None, f"make it again: {_again(run_dir)}")
        if len(classes) == count and wnids in (None, [entry["wnid"] for entry in classes]):
            return classes
        raise PipelineError(
            f"{path} was trained on other classes than {listed} names; "
            "choose the run directory it belongs to with --run"
        )
    words = header.get("words") or [""] * count
    return [{"wnid": wnid, "words": text} for wnid, text in zip(wnids or [""] * count, words, strict=True)]


def _mean(run_dir: RunDir, imported: np.ndarray | None, config: Config) -> np.ndarray:
    if imported is None:
        path, size = run_dir.preprocess / "mean.npy", config.preprocess.size
        if path.exists():
            require_sound_description(run_dir, path.name)
        remedy = f"the recipe subtracts this mean of the training pictures: {_again(run_dir)}, or import with --mean"
        if not path.exists():
            raise PipelineError(f"{path} does not exist; {remedy}")
        return read_mean(path, size, remedy)
    sides = (config.preprocess.size, config.input.crop)
    if imported.shape not in [(side, side, 3) for side in sides]:
        raise PipelineError(
            f"the mean picture has shape {imported.shape}, which fits neither the stored pictures ({sides[0]}) nor the "
            f"crops ({sides[1]})"
        )
    return imported.astype(np.float32, copy=False)


def _again(run_dir: RunDir) -> str:
    return f"run {preprocess_command(run_dir)}"
