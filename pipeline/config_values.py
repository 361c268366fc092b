"""Values for a configuration's fields: from a TOML file, the command line or JSON, checked, and back.

``--config FILE.toml`` and ``--set key=value`` change single fields; a key that does not exist or a value of the wrong
type is refused with the nearest valid name. The resolved configuration is written into the run directory as JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, Final

from pipeline.config import LAYERS, SEED, Config, Network, Schedule, nearest
from pipeline.errors import PipelineError

FLOAT32_MAX: Final = 3.4e38
FLOAT32_MIN: Final = 1.2e-38  # what is smaller may become 0


def changes(
    toml: Path | None = None,
    settings: list[str] | None = None,
    seed: int | None = None,
    weights: Path | None = None,
) -> Callable[[Config], Config]:
    """What changes single settings of configurations: a TOML file, then ``key=value`` settings, then other flags.

    The file is read once, here, as it may be a pipe.

    Raises
    ------
    PipelineError
        Unreadable file; and where the changes are made: unknown key, value of the wrong type or out of range.
    """
    entries = [] if toml is None else [(key, value, str(toml)) for key, value in _read_toml(toml)]

    def change(config: Config) -> Config:
        asked = [*entries, *map(_read_setting, settings or [])]
        if seed is not None:
            asked.append(("seed", seed, "--seed"))
        if weights is not None:
            asked.append(("train.weights", str(weights), "--weights"))
        for key, value, where in asked:
            if key == "recipe":
                raise PipelineError(f"{where}: a recipe is many settings at once; name it with --recipe")
            config = _with_value(config, key, value, where)
        if config.train.weights is not None:  # a later start may come from another working directory
            config = replace(config, train=replace(config.train, weights=str(Path(config.train.weights).absolute())))
        _check(config, str(toml) if toml is not None and not settings else None)
        return config

    return change


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any], where: str) -> Config:
    """The inverse of :func:`to_dict`; ``where`` names the file in messages."""
    recipe = values.get("recipe")
    if not isinstance(recipe, str):
        raise PipelineError(f"{where} names no recipe; remove it or start a new run with --run")
    config = with_values(Config(recipe=recipe), values, where)
    _check(config, where)
    return config


def with_values(config: Config, values: dict[str, Any], where: str) -> Config:
    """The configuration with those of nested dictionaries in place of its own; whether all fit together is not checked.

    Raises
    ------
    PipelineError
        Unknown key, value of the wrong type.
    """
    for key, value in flatten(values):
        config = _with_value(config, key, value, where)
    return config


def keys() -> list[str]:
    """All configuration keys that can be set, such as ``train.batch_size``."""
    return [key for key, _ in flatten(dataclasses.asdict(SEED)) if key != "recipe"]


def difference(a: Config, b: Config) -> list[str]:
    """The keys in which two configurations differ, each with both values: ``a``'s "there", ``b``'s "here"."""
    left, right = dict(flatten(dataclasses.asdict(a))), dict(flatten(dataclasses.asdict(b)))
    return [
        f"{key} ({as_text(left[key])} there, {as_text(right[key])} here)" for key in left if left[key] != right[key]
    ]


def as_text(value: Any) -> str:
    """A setting's value as ``--set`` takes it."""
    if isinstance(value, str):
        return value
    return "none" if value is None else json.dumps(value)


def _read_toml(path: Path) -> list[tuple[str, Any]]:
    try:
        # Some editors begin a file with an invisible mark, which TOML does not know.
        return list(flatten(tomllib.loads(path.read_text("utf-8-sig"))))
    except OSError as error:
        raise PipelineError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path} is not valid TOML: {error}") from error


def _read_setting(setting: str) -> tuple[str, Any, str]:
    """Key and value of ``--set key=value``, and what messages call it."""
    key, sign, text = setting.partition("=")
    if not sign:
        raise PipelineError(f"--set {setting} has no '='; write --set key=value, for example --set train.batch_size=64")
    return key.strip(), _parse(text.strip()), f"--set {setting}"


def _parse(text: str) -> Any:
    try:
        read = tomllib.loads(f"value = {text}")
        return read["value"] if len(read) == 1 else text  # with a line end in it, a value can bring other keys
    except (ValueError, RecursionError):
        return {"true": True, "false": False}.get(text.lower(), text)


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dictionaries as pairs of a key, such as ``train.batch_size``, and a value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _with_value(config: Any, key: str, value: Any, where: str, whole: str | None = None) -> Any:
    whole = whole or key
    name, _, rest = key.partition(".")
    types_of = typing.get_type_hints(type(config))
    if name not in types_of or bool(rest) != is_dataclass(getattr(config, name)):
        raise PipelineError(
            f"{where}: there is no configuration key {whole!r}{nearest(whole, keys())}; "
            "pipeline/config.py lists all: batch_size in its class Train is train.batch_size, and so on"
        )
    if rest:
        return replace(config, **{name: _with_value(getattr(config, name), rest, value, where, whole)})
    return replace(config, **{name: _coerce(value, types_of[name], whole, where)})


def _coerce(value: Any, wanted: Any, key: str, where: str) -> Any:
    """Accept ``value`` as ``wanted`` (int for float, list for tuple, nothing else), or say what was expected."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    # As text, "none" stands for nothing only where nothing is a value: input.mean=none is a word like any other.
    if type(None) in options and (value is None or value == "none"):
        return None
    if wanted == Schedule and type(value) in (int, float):  # one for all epochs
        value = [[0, value]]
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            parts = typing.get_args(option)
            if parts[-1] is Ellipsis:
                return tuple(_coerce(v, parts[0], key, where) for v in value)
            if len(parts) == len(value):
                return tuple(_coerce(v, p, key, where) for v, p in zip(value, parts, strict=True))
        if option is float and type(value) in (int, float):
            if not abs(value) < FLOAT32_MAX:
                raise PipelineError(f"{where}: {key} takes finite numbers that float32 can hold, not {value!r}")
            return float(value)
        if option in (int, bool, str) and type(value) is option:
            return value
    raise PipelineError(f"{where}: {key} takes {_WORDS[wanted]}, not {value!r}")


# What a person is told of the types that fields and their parts have.
_WORDS: Final[dict[Any, str]] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    str | None: "a file or none",
    int | None: "a whole number or none",
    tuple[int, int]: "two whole numbers such as [2, 1]",
    tuple[float, ...]: "a list of numbers such as [0.01, 0.03]",
    tuple[str, ...]: 'a list of words such as ["conv1", "conv2"]',
    Schedule: "a number, or a list of first epochs and values such as [[0, 0.01], [30, 0.001]]",
    tuple[int, float]: "pairs of a first epoch and a value such as [0, 0.01]",
}


def _check(config: Config, file: str | None = None) -> None:
    """Refuse values that no stage could work with; ``file`` is where they may have come from."""
    inp, net, train = config.input, config.network, config.train
    side = inp.crop + sum(inp.border)
    rules = [
        (config.seed >= 0 and config.seed < 2**63, "seed must lie between 0 and 2^63 - 1"),
        (
            inp.crop <= config.preprocess.size,
            f"input.crop ({inp.crop}) must not exceed preprocess.size ({config.preprocess.size}), the stored pictures",
        ),
        (config.preprocess.size <= 4096, "preprocess.size must be at most 4096"),
        (
            config.preprocess.filter in ("bicubic", "bilinear", "box", "lanczos"),
            "preprocess.filter must be bicubic, bilinear, box or lanczos",
        ),
        (config.preprocess.decoder in ("pillow", "simplejpeg"), "preprocess.decoder must be pillow or simplejpeg"),
        (1 <= config.preprocess.shard_images <= 65536, "preprocess.shard_images must lie between 1 and 65536"),
        (inp.crop > 0, "input.crop must be positive"),
        (min(inp.border) >= 0 and max(inp.border) <= 64, "input.border must lie between 0 and 64"),
        (1 <= net.pool_stride <= net.pool_size <= 5, "network.pool_size must lie between network.pool_stride and 5"),
        (
            side >= _least_side(net),
            f"input.crop plus input.border must be at least {_least_side(net)}, or nothing is left after three pools",
        ),
        (inp.mean in ("none", "image", "center"), "input.mean must be none, image or center"),
        (inp.scale >= FLOAT32_MIN, "input.scale must be a positive number that float32 can hold"),
        (0 <= inp.jitter <= 10, "input.jitter must lie between 0 and 10"),
        ((inp.jitter_epochs or 0) >= 0, "input.jitter_epochs must not be negative"),
        (
            len(net.weight_std) == len(LAYERS) and min(net.weight_std) >= 0,
            f"network.weight_std needs {len(LAYERS)} values, one for each layer, none negative",
        ),
        (len(net.bias) == len(LAYERS), f"network.bias needs {len(LAYERS)} values, one for each layer"),
        (0 < net.dropout_keep <= 1, "network.dropout_keep must lie in (0, 1]"),
        (
            0 <= net.lrn_size <= 512 and net.lrn_k > 0,
            "network.lrn_size must lie between 0 and 512, network.lrn_k above 0",
        ),
        (net.lrn_alpha >= 0, "network.lrn_alpha must not be negative"),
        (1 <= net.fc_units <= 65536, "network.fc_units must lie between 1 and 65536"),
        (1 <= train.batch_size <= 65536, "train.batch_size must lie between 1 and 65536"),
        (1 <= config.eval.batch_size <= 65536, "eval.batch_size must lie between 1 and 65536"),
        (config.eval.views in (1, 10), "eval.views must be 1 or 10"),
        (train.order in ("auto", "uniform", "blocks"), "train.order must be auto, uniform or blocks"),
        (
            len(set(train.frozen) & set(LAYERS)) == len(train.frozen) < len(LAYERS),
            f"train.frozen must name layers, each once and not all: {', '.join(LAYERS)}",
        ),
        (train.epochs >= 1, "train.epochs must be at least 1"),
        (bool(train.lr) and train.lr[0][0] == 0, "train.lr must have an entry for epoch 0"),
        *(
            (_ascending(schedule), f"train.{name} must list its epochs in ascending order, no number negative")
            for name, schedule in (("lr", train.lr), ("bias_lr", train.bias_lr), ("conv1_lr", train.conv1_lr))
        ),
        (train.bias_lr_factor >= 0, "train.bias_lr_factor must not be negative"),
        (0 <= train.momentum < 1, "train.momentum must lie in [0, 1)"),
        (train.weight_decay >= 0, "train.weight_decay must not be negative"),
        (
            min(train.checkpoint_every, train.log_every, train.keep_checkpoints, train.plateau_steps) >= 1,
            "train.checkpoint_every, train.log_every, train.keep_checkpoints, train.plateau_steps must be at least 1",
        ),
        (
            min(train.save_every, train.validate_every) >= 1,
            "train.save_every and train.validate_every must be at least 1",
        ),
        (config.loader.slots is None or 2 <= config.loader.slots <= 64, "loader.slots must lie between 2 and 64"),
        (config.loader.threads is None or 1 <= config.loader.threads <= 64, "loader.threads must lie between 1 and 64"),
    ]
    for holds, rule in rules:
        if not holds:
            raise PipelineError(f"{file}: {rule}" if file else rule)


def _least_side(net: Network) -> int:
    """The smallest input that leaves one pixel after conv1 (11x11, stride 4) and three pools, which round down."""
    side = 1
    for _ in range(3):
        side = (side - 1) * net.pool_stride + net.pool_size
    return (side - 1) * 4 + 11


def _ascending(schedule: Schedule) -> bool:
    epochs = [-1, *(epoch for epoch, _ in schedule)]
    return all(a < b for a, b in itertools.pairwise(epochs)) and all(value >= 0 for _, value in schedule)
