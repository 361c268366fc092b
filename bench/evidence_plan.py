"""What ``bench.evidence`` runs: the recipes, their ablations and PyTorch's repetition, each with its configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pipeline.config import RECIPES, Config, Schedule
from pipeline.config_values import changes
from pipeline.run_dir import RunDir

BASE: Final = "original"  # what the ablations leave something out of, and what PyTorch repeats
# Left out, settings that leave it out, and what the paper and the authors' own logs say it is worth.
ABLATIONS: Final = (
    (
        "LRN",
        ("network.lrn_size=0", "network.map_norm=false"),
        "1.4 / 1.2 points (section 3.3); net 148 beside net 145: 1.4 / 1.2",
    ),
    (
        "overlap in pooling",
        ("network.pool_size=2",),
        "0.4 / 0.3 points (section 3.4); net 147 beside net 145: 0.4 / 0.3",
    ),
    ("colour jitter", ("input.jitter=0",), "over 1 point top-1 (section 4.1)"),
    ("dropout", ("network.dropout_keep=1",), '"substantial overfitting" (section 4.2)'),
    ("flips", ("input.flip=false",), '"substantial overfitting" without crops and flips (section 4.1)'),
)
LOG_EVERY: Final = 5  # steps


@dataclass(frozen=True)
class Planned:
    """One training run: a recipe with single settings changed, by hand or by PyTorch."""

    name: str
    recipe: str
    seed: int
    changes: tuple[str, ...] = ()
    torch: bool = False


@dataclass(frozen=True)
class How:
    """What is the same for all runs: how long, on which batches, with which settings, and where they are computed."""

    epochs: int
    batch: int
    changes: tuple[str, ...] = ()  # the command line's own settings
    device: str = "cpu"  # resolved: never "auto"
    precision: str = "fp32"
    machine: str = ""
    jobs: int = 1


def planned(base: str, seeds: Sequence[int]) -> list[Planned]:
    """All runs, the ones that say most first, and PyTorch's, which take longest, early enough to be done in time."""
    recipes: list[tuple[str, str, tuple[str, ...]]] = [
        ("seed", "seed", ()),
        ("seed without the last ReLU", "seed", ("network.final_relu=false",)),
        ("original", "original", ()),
        ("caffe", "caffe", ()),
        ("paper", "paper", ()),
    ]
    others = [entry for entry in recipes if entry[0] != base]
    runs = []
    for seed in seeds:
        runs += [Planned(base, base, seed), Planned(f"{base} in PyTorch", base, seed, torch=True)]
    runs += [Planned(name, recipe, seed, changes) for seed in seeds for name, recipe, changes in others]
    return runs + [
        Planned(f"{base} without {what}", base, seed, changes) for seed in seeds for what, changes, _ in ABLATIONS
    ]


def scaled(schedule: Schedule, factor: float) -> Schedule:
    """The schedule with its epochs multiplied and rounded up; of values that meet in one epoch the last counts."""
    return tuple({math.ceil(epoch * factor): value for epoch, value in schedule}.items())


def configured(run: Planned, how: How) -> Config:
    """The run's complete configuration."""
    config = changes(None, [*run.changes, *how.changes], run.seed)(RECIPES[run.recipe])
    train, inp = config.train, config.input
    factor = how.epochs / train.epochs
    train = replace(
        train,
        epochs=how.epochs,
        batch_size=how.batch,
        lr=scaled(train.lr, factor),
        bias_lr=scaled(train.bias_lr, factor),
        conv1_lr=scaled(train.conv1_lr, factor),
        log_every=LOG_EVERY,
        keep_checkpoints=1,
    )
    if inp.jitter_epochs is not None:
        inp = replace(inp, jitter_epochs=math.ceil(inp.jitter_epochs * factor))
    return changes()(replace(config, train=train, input=inp))


def folder_of(out: Path, run: Planned, how: How) -> RunDir:
    slug = "-".join(run.name.lower().split())
    suffix = "" if how.precision == "fp32" else f"-{how.precision}"
    return RunDir(out / f"{slug}-seed{run.seed}-{how.epochs}x{how.batch}{suffix}")
