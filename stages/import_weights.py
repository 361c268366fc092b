"""Import: weights from elsewhere become a run directory's checkpoint (``docs/formats.md``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from net.weights import caffe
from net.weights.errors import WeightsError
from pipeline.checkpoint import checkpoints, save_checkpoint
from pipeline.config import Config, load_config
from pipeline.config_values import from_dict, to_dict
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir, hash_file, read_sealed, write_sealed
from pipeline.settings import Request
from stages.setup import MEAN
from stages.weights_file import FORMS, read_weights, require_mean_shape


def run(run_dir: RunDir, file: Path, *, mean: Path | None, request: Request) -> Path:
    """Write the weights in ``file`` as checkpoint 0 of the run and return its path.

    Parameters
    ----------
    file : what ``stages.weights_file`` reads
    mean : Caffe's mean image (``.binaryproto``), to be subtracted instead of the run's own
    request : the network's recipe, where None is what the file says, or ``caffe`` for a caffemodel; and changes to it

    Raises
    ------
    PipelineError
        The file is damaged, unreadable or of another network; the run has checkpoints already.
    """
    if checkpoints(run_dir.train):
        raise PipelineError(f"{run_dir.train} has checkpoints already; import into a new run with --run")

    def choose(own: Config | None) -> Config:
        if request.recipe is not None:
            own = load_config(request.recipe)
        elif own is None:
            raise PipelineError(f"{file} does not say which network it is; name its recipe with --recipe")
        config = request.change(_with_stored_pictures(own, run_dir))
        return replace(config, train=replace(config.train, weights=None))  # where they came from is another run's past

    try:
        read = read_weights(file, choose)
        config, subtracted = read.config, None if read.config.input.mean == "none" else read.mean
        if mean is not None:
            subtracted = _read_mean(mean, config)
        digest = hash_file(file)
    except WeightsError as error:
        raise PipelineError(f"cannot import {file}: {error} ({FORMS} can be)") from error
    except OSError as error:
        raise PipelineError(f"cannot read {error.filename or file}: {error.strerror or error}") from error
    arrays = read.parameters | ({} if subtracted is None else {MEAN: subtracted})
    header = {
        "schema": 1,
        "config": to_dict(config),
        "classes": len(arrays["fc8.b"]),
        "validation": None,
        "imported": {"file": file.name, "sha256": digest},
        **read.classes,
    }
    path = save_checkpoint(run_dir.train, 0, header, arrays)
    if not run_dir.config.exists():
        write_sealed(run_dir.config, to_dict(config))
    lacks_mean = config.input.mean != "none" and MEAN not in arrays and not (run_dir.preprocess / "mean.npy").exists()
    has_pictures = (run_dir.preprocess / "manifest.json").exists()
    pictures = f"--stage preprocess --source DIR {run_dir.flag}"
    print(
        f"imported {file.name}, {len(arrays['fc8.b'])} classes, recipe {config.recipe}, as {path}; use it"
        + (f", after {pictures}, whose mean picture the recipe subtracts," if lacks_mean else "")
        + f" with\n  python run_pipeline.py --stage predict IMAGE... {run_dir.flag}\n"
        + ("or with\n" if lacks_mean or has_pictures else f"or, after {pictures}, with\n")
        + f"  python run_pipeline.py --stage eval {run_dir.flag}"
    )
    return path


def _read_mean(file: Path, config: Config) -> np.ndarray:
    try:
        mean = caffe.read_mean(file)
        if config.input.mean == "none":
            raise PipelineError(f"the recipe {config.recipe} subtracts no mean; leave out --mean")
        require_mean_shape(mean.shape, config)
    except WeightsError as error:
        raise PipelineError(
            f"cannot use {file}: {error} (--mean takes Caffe's mean image, a .binaryproto file)"
        ) from error
    return mean


def _with_stored_pictures(config: Config, run_dir: RunDir) -> Config:
    """The configuration, with the run's own rule for stored pictures where it has one."""
    if not run_dir.config.exists():
        return config
    own = from_dict(read_sealed(run_dir.config, "import into a new run with --run"), str(run_dir.config))
    return replace(config, preprocess=own.preprocess)
