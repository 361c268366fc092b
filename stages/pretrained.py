"""Training that begins with the weights of a network trained before: fine-tuning (paper, section 6).

The file is whatever ``stages/weights_file.py`` reads. Its network must compute the same from a picture as this run's
does, but for the last layer, which stays as drawn where the classes are others; where nobody has named a recipe, the
run's settings become those of the file, as far as that goes. Momenta begin at zero, and the mean picture that is
subtracted is that of the run's own pictures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from net.weights.errors import WeightsError
from pipeline.config import LAYERS, Config, Input, Network
from pipeline.config_values import difference
from pipeline.errors import PipelineError
from pipeline.run_dir import hash_file
from stages.weights_file import FORMS, Weights, read_config, read_weights

_LAST: Final = LAYERS[-1]
_OTHER_FILE: Final = "choose another file with --weights, or none with --set train.weights=none"

# Settings that change how a network is trained, and not what it computes from a picture afterwards.
_NETWORK_FREE: Final = ("weight_std", "bias", "dropout_keep")
_INPUT_FREE: Final = ("random_crop", "flip", "jitter", "jitter_epochs", "jitter_rescale")


def with_network_of(file: Path, config: Config, change: Callable[[Config], Config], *, tell: bool) -> Config:
    """The configuration with what the file's network computes from a picture in place of its own.

    All else stays, and where the file does not say which network it is, everything.

    Parameters
    ----------
    change : what single settings were named for this training; they have to agree with the file
    tell : whether to print a line where that changes anything

    Raises
    ------
    PipelineError
        The file cannot be read, its network does not fit the run's pictures or the settings named.
    """
    with _readable(file):
        own = read_config(file)
    if own is None:
        return config
    free = {name: getattr(config.network, name) for name in _NETWORK_FREE}
    drawn = {name: getattr(config.input, name) for name in _INPUT_FREE}
    taken = replace(config, network=replace(own.network, **free), input=replace(own.input, **drawn))
    if taken.input.crop > config.preprocess.size:
        raise PipelineError(
            f"the network in {file} takes crops of {taken.input.crop} pixels, and the pictures of this run are stored "
            f"with {config.preprocess.size}; {_OTHER_FILE}, or begin another run with "
            f"--set preprocess.size={own.preprocess.size}"
        )
    taken = change(taken)
    _require_same_function(file, own, taken, "change these with --set or leave them out")
    names = [entry.partition(" ")[0] for entry in difference(config, taken)]
    if names and tell:
        print(
            f"as no --recipe is named, the network is that of {file} (recipe {own.recipe}), with its {', '.join(names)}"
        )
    return taken


def take_weights(file: Path, config: Config, wnids: Sequence[str], parameters: dict[str, np.ndarray]) -> dict[str, Any]:
    """Put the weights in ``file`` in the place of drawn ones.

    Parameters
    ----------
    wnids : the run's classes, in the order of the scores
    parameters : all parameters as drawn, float32; written to

    Returns
    -------
    dict
        What checkpoints say of it: ``file``, its name; ``sha256``; ``drawn``, the layers that stayed as drawn.

    Raises
    ------
    PipelineError
        The file cannot be read, or holds a network that computes something else.
    """

    def choose(own: Config | None) -> Config:
        if own is not None:
            same = own.recipe == config.recipe
            remedy = "change these with --set" if same else f"begin with --recipe {own.recipe}"
            _require_same_function(file, own, config, remedy)
        return own or config

    with _readable(file):
        read, digest = read_weights(file, choose), hash_file(file)
    drawn = [] if _same_classes(read, wnids) else [_LAST]
    for name, array in read.parameters.items():
        if name.split(".")[0] not in drawn:
            parameters[name][...] = array
    print(
        f"beginning with the weights of {file}"
        + (f", {_LAST} drawn anew: its classes are not those of the pictures here" if drawn else "")
    )
    return {"file": file.name, "sha256": digest, "drawn": drawn}


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Tell of a file that cannot be read in a sentence."""
    if file.is_dir():  # the system's words for it, of a mapping, say nothing
        raise PipelineError(
            f"{file} is a folder; --weights takes a file, of a run for example {file / 'train' / 'step-00000100.ckpt'}"
        )
    try:
        yield
    except WeightsError as error:
        raise PipelineError(f"cannot begin with {file}: {error} ({FORMS} can be read)") from error
    except OSError as error:
        raise PipelineError(
            f"cannot read {file}, the weights to begin with: {error.strerror or error}; {_OTHER_FILE}"
        ) from error


def _same_classes(read: Weights, wnids: Sequence[str]) -> bool:
    """Whether the scores stand for the same classes; a file that names none is believed where their number is right."""
    return read.classes.get("wnids", list(wnids)) == list(wnids) and len(read.parameters[f"{_LAST}.b"]) == len(wnids)


def _require_same_function(file: Path, there: Config, here: Config, remedy: str) -> None:
    differing = difference(_function(there), _function(here))
    if differing:
        raise PipelineError(
            f"the network in {file} computes something else than this run's: {'; '.join(differing)}. "
            f"To begin with its weights, {remedy}"
        )


def _function(config: Config) -> Config:
    """The configuration with everything at fixed values but what the network computes from a picture."""
    network = replace(config.network, **{name: getattr(Network(), name) for name in _NETWORK_FREE})
    input = replace(config.input, **{name: getattr(Input(), name) for name in _INPUT_FREE})
    return Config(recipe="", network=network, input=input)
