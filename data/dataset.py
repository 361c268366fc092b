"""The preprocessed pictures of a run with what was measured on them, as training and evaluation use them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.manifest import read_manifest
from data.origin import preprocess_command
from data.split import Split, open_split
from pipeline.config import Config
from pipeline.config_values import difference, with_values
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir, read_json


@dataclass(frozen=True)
class Dataset:
    """The preprocessed pictures and what was measured on them."""

    manifest: dict[str, Any]
    classes: list[dict[str, Any]]
    train: Split
    val: Split
    mean: np.ndarray  # float32 (size, size, 3), the training pictures' mean, 0..255
    directions: np.ndarray  # float64 (3, 3): eigenvector times standard deviation, a row each, 0..255


def open_dataset(run: RunDir) -> Dataset:
    """Open the shards of a run; refuses, with the command that mends it, what is missing or does not match."""
    manifest = read_manifest(run)
    remedy = f"make it again: {preprocess_command(run)}"
    return Dataset(
        manifest=manifest,
        classes=read_classes(run.preprocess / "classes.json", manifest["classes"], remedy),
        train=open_split(run.preprocess, manifest, "train"),
        val=open_split(run.preprocess, manifest, "val"),
        mean=read_mean(run.preprocess / "mean.npy", manifest["size"], remedy),
        directions=_read_directions(run.preprocess / "color.json", remedy),
    )


def require_stored(config: Config, dataset: Dataset, run: RunDir) -> None:
    """Refuse settings of ``preprocess`` other than those that the stored pictures were made with."""
    manifest = dataset.manifest
    made = {
        "upright": False,  # before there was this choice
        **manifest.get("made_with", {}).get("preprocess", {}),
        "size": manifest["size"],
        "filter": manifest["filter"],
    }
    differing = difference(with_values(config, {"preprocess": made}, str(run.preprocess)), config)
    if differing:
        raise PipelineError(
            f"the pictures in {run.preprocess} were made with other settings: {'; '.join(differing)}; "
            "leave them as they are, or preprocess into a new run (--run)"
        )


def require_size(config: Config, dataset: Dataset, run: RunDir) -> None:
    """Refuse a configuration made for stored pictures of another size."""
    stored = dataset.manifest["size"]
    if config.preprocess.size != stored:
        raise PipelineError(
            f"the pictures in {run.preprocess} have {stored} pixels a side, but preprocess.size is "
            f"{config.preprocess.size}; leave it as it is, or preprocess into a new run (--run)"
        )


def read_classes(path: Path, count: int | None, remedy: str) -> list[dict[str, Any]]:
    """The classes of ``classes.json``, each with ``wnid`` and ``words``; ``count`` is None where any number will do."""
    entries = read_json(path, remedy).get("classes")
    if (
        not isinstance(entries, list)
        or count not in (None, len(entries))
        or not all(isinstance(e, dict) and isinstance(e.get("wnid"), str) and "words" in e for e in entries)
    ):
        raise PipelineError(f"{path} does not describe {'' if count is None else f'{count} '}classes; {remedy}")
    return entries


def read_mean(path: Path, size: int, remedy: str) -> np.ndarray:
    """The mean picture of ``mean.npy``, float32 (size, size, 3)."""
    try:
        mean = np.load(path, allow_pickle=False, mmap_mode="r")  # a claimed shape allocates nothing
        if mean.dtype != np.float32 or mean.shape != (size, size, 3):
            raise ValueError(f"its type is {mean.dtype}, its shape {mean.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise PipelineError(f"cannot read {path} ({error}); {remedy}") from error
    return np.array(mean)


def _read_directions(path: Path, remedy: str) -> np.ndarray:
    """Eigenvector times standard deviation, a row each, 0..255."""
    color = read_json(path, remedy)
    try:
        values, vectors = (np.array(color[key], dtype=np.float64) for key in ("eigenvalues", "eigenvectors"))
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise PipelineError(f"{path} holds no eigenvalues and eigenvectors; {remedy}") from error
    if values.shape != (3,) or vectors.shape != (3, 3) or not np.isfinite(values).all() & np.isfinite(vectors).all():
        raise PipelineError(f"{path} holds other than three eigenvalues and eigenvectors; {remedy}")
    return vectors * (np.sqrt(np.maximum(values, 0)) * 255)[:, None]
