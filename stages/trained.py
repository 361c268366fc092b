"""A checkpoint with all that is needed to use it: configuration, layers, parameters, mean picture, class names.

Unlike ``data.dataset.open_dataset`` this asks for no shards: a checkpoint that was imported, or whose shards have been
removed, can still predict and be exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from data.dataset import Dataset, read_classes, read_mean, require_size
from data.manifest import require_sound_description
from data.origin import remedy
from data.sampling import view_crops
from net.layers import Array, Layer, Parameters, fuse
from net.network import Preparation, prediction
from pipeline.checkpoint import Arrays, Checkpoint, chosen_checkpoint
from pipeline.config import Config
from pipeline.config_values import from_dict
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir
from stages.setup import MEAN, MOMENTUM, network_layers, parameters_of, preparation, shapes

Predict = Callable[[dict[str, Array]], Array]  # see net.network.prediction


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

    def predictor(self, ops: ModuleType, views: int) -> Predict:
        """The network as a function from crops to class probabilities."""
        return prediction(ops, fuse(self.layers, ops), self.on_device(ops), self.preparation(ops), views)

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
    """What a person calls class ``number``, which ``entry`` of classes.json describes; see :meth:`Trained.label`."""
    words = str(entry.get("words") or "").split(",")[0].strip()
    return words or str(entry.get("wnid") or f"class {number}")


def load_trained(run_dir: RunDir, checkpoint: str, dataset: Dataset | None = None) -> Trained:
    """Read the checkpoint that ``latest``, ``best`` or a path stands for (``pipeline.checkpoint.chosen_checkpoint``).

    ``dataset`` are the run's pictures where the network is to be used on them.

    Raises
    ------
    PipelineError
        It is missing or damaged, does not fit its own configuration, or belongs to other classes or to pictures of
        another size than the run's.
    """
    saved = chosen_checkpoint(run_dir.train, checkpoint)
    values, count = saved.header.get("config"), saved.header.get("classes")
    if not isinstance(values, dict) or not isinstance(count, int):
        raise PipelineError(f"{saved.path} holds no configuration; choose a checkpoint written by --stage train")
    config = from_dict(values, str(saved.path))
    listed = _listed_classes(run_dir, saved, count)
    if dataset is not None:
        require_size(config, dataset, run_dir)
    layers = network_layers(config, count)
    parameters = parameters_of(saved.arrays)
    if {name: array.shape for name, array in parameters.items()} != shapes(layers, config):
        raise PipelineError(f"{saved.path} holds other arrays than its configuration says; choose another checkpoint")
    momenta = {n.removeprefix(MOMENTUM): a for n, a in saved.arrays.items() if n.startswith(MOMENTUM)}
    return Trained(
        path=saved.path,
        step=saved.header["step"],
        seal=saved.seal,
        header=saved.header,
        config=config,
        classes=_own_classes(saved, count) if listed is None else listed,
        layers=layers,
        parameters=parameters,
        momenta=momenta,
        mean=None if config.input.mean == "none" else _mean(run_dir, saved.arrays.get(MEAN), config),
    )


def _listed_classes(run_dir: RunDir, saved: Checkpoint, count: int) -> list[dict[str, Any]] | None:
    """The run's classes, which must be those of the checkpoint; None where it has none."""
    path = run_dir.preprocess / "classes.json"
    if not path.exists():
        return None
    require_sound_description(run_dir, path.name)
    classes = read_classes(path, None, f"make it again: {remedy(run_dir)}")
    elsewhere = f"({path}); choose the run directory it belongs to with --run"
    if len(classes) != count:
        raise PipelineError(
            f"{saved.path} was trained on {count} classes, but the data have {len(classes)} {elsewhere}"
        )
    if saved.header.get("wnids") not in (None, [entry["wnid"] for entry in classes]):
        raise PipelineError(f"{saved.path} was trained on other classes than the data have {elsewhere}")
    return classes


def _own_classes(saved: Checkpoint, count: int) -> list[dict[str, Any]]:
    """What the checkpoint itself knows of its classes."""
    wnids, words = (saved.header.get(key) or [""] * count for key in ("wnids", "words"))
    if not all(isinstance(names, list) and len(names) == count for names in (wnids, words)):
        raise PipelineError(f"{saved.path} names other classes than its {count}; choose another checkpoint")
    return [{"wnid": wnid, "words": text} for wnid, text in zip(wnids, words, strict=True)]


def _mean(run_dir: RunDir, imported: np.ndarray | None, config: Config) -> np.ndarray:
    if imported is None:
        path = run_dir.preprocess / "mean.npy"
        mend = f"the recipe subtracts this mean of the training pictures: {remedy(run_dir)}, or import with --mean"
        if not path.exists():
            raise PipelineError(f"{path} does not exist; {mend}")
        require_sound_description(run_dir, path.name)
        return read_mean(path, config.preprocess.size, mend)
    sides = (config.preprocess.size, config.input.crop)
    if imported.shape not in [(side, side, 3) for side in sides]:
        raise PipelineError(
            f"the mean picture has shape {imported.shape}, which fits neither the stored pictures ({sides[0]}) nor the "
            f"crops ({sides[1]})"
        )
    return imported.astype(np.float32, copy=False)
