"""Which settings a run works with: its own or a recipe's, those of its shards, and what the command line changes.

``docs/design.md`` has the rule of every stage ("Where settings come from"). :func:`settle` is that of preprocess and
train. The other stages find theirs in a checkpoint or a file, and apply at most a :class:`Request` to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint import checkpoints, newest_sound
from pipeline.config import Config, load_config
from pipeline.config_values import from_dict, with_values
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir, read_sealed


@dataclass(frozen=True)
class Request:
    """What the command line asks of the settings."""

    recipe: str | None  # --recipe
    change: Callable[[Config], Config]  # --config, --set and --seed, see pipeline.config_values.changes

    def applied_to(self, config: Config) -> Config:
        """The recipe named, else ``config``, with the changes."""
        return self.change(config if self.recipe is None else load_config(self.recipe))


@dataclass(frozen=True)
class Settled:
    """A run's configuration, as preprocess and as train work with it.

    ``preprocess`` is None where no shards are to be made. The two differ where shards are there: training may have
    another seed than their shuffle, and a recipe named for preprocess asks for shards of that recipe, which the stage
    refuses where others are there.
    """

    train: Config
    preprocess: Config | None


def settle(run: RunDir, request: Request, made_with: dict[str, Any], *, default: str, preprocess: bool) -> Settled:
    """The configuration of a run that is to be preprocessed or trained.

    Parameters
    ----------
    made_with : dict
        The seed and the ``preprocess`` settings that the run's shards were made with; empty where there are none.
    default : str
        The recipe of a run that has no settings yet.
    preprocess : bool
        Whether shards are to be made or mended.

    Raises
    ------
    PipelineError
        The run's own settings cannot be read, or what is asked for does not exist or does not fit together.
    """
    base = load_config(request.recipe) if request.recipe is not None else _own(run, default)
    made, where = {key: value for key, value in made_with.items() if key != "seed"}, str(run.preprocess)
    train = request.change(with_values(base, made, where))
    if not preprocess:
        return Settled(train, None)
    as_made = base if request.recipe is not None else with_values(base, made_with, where)
    return Settled(train, request.change(as_made))


def remedy_of_config(run: RunDir) -> str:
    """How to go on where a run's ``config.json`` is damaged: the end of a sentence."""
    if checkpoints(run.train):
        return "remove config.json, and the settings are taken from the newest checkpoint"
    return "name the recipe with --recipe and changes with --set, which writes config.json anew"


def _own(run: RunDir, default: str) -> Config:
    """The run's own settings, from ``config.json`` or else its newest sound checkpoint; the default recipe's if new."""
    if run.config.exists():
        return from_dict(read_sealed(run.config, remedy_of_config(run)), str(run.config))
    if not checkpoints(run.train):
        return load_config(default)
    saved, complaints = newest_sound(run.train)
    if saved is None:
        for complaint in complaints:
            print(f"warning: {complaint}")
        raise PipelineError(
            f"{run.config} is missing, and no checkpoint in {run.train} can be read to take the settings from; "
            "name the recipe with --recipe and changes with --set, and start over with --restart"
        )
    print(f"{run.config} is missing: the settings are those of {saved.path}")
    values = saved.header.get("config")
    return from_dict(values if isinstance(values, dict) else {}, str(saved.path))
