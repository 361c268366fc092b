"""Every number of a run in frozen dataclasses, and the recipes that fill them.

A recipe is a complete :class:`Config`. ``--config FILE.toml`` and ``--set key=value`` change single fields; a key
that does not exist or a value of the wrong type is refused with the nearest valid name. The resolved configuration
is written into the run directory as JSON.

Schedules are tuples of ``(first epoch, value)``, epochs counted from 0; the value holds until the next entry.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Final

from pipeline.errors import PipelineError

Schedule = tuple[tuple[int, float], ...]

FLOAT32_MAX: Final = 3.4e38


@dataclass(frozen=True)
class Preprocess:
    """How source pictures become shards."""

    size: int = 256  # side of the stored square: short side resized to it, centre cropped (paper, section 2)
    filter: str = "bicubic"  # resampling filter of the resize
    decoder: str = "pillow"  # pillow | simplejpeg (an extra): who decodes the JPEGs
    shard_images: int = 1024  # pictures a shard; 1024 x 192 KiB = 192 MiB, and so much memory a job


@dataclass(frozen=True)
class Input:
    """From a stored uint8 picture to the network's input (paper, sections 2 and 4.1)."""

    crop: int = 224  # side of the random crop in training, of the views in evaluation
    border: tuple[int, int] = (2, 1)  # zero rows and columns before and after the crop: 224 + 2 + 1 = 227
    scale: float = 1 / 255  # factor on (pixel - mean + shift); 1/255 puts pixels on 0..1
    mean: str = "none"  # none | image (the mean picture, cropped where the picture is) | center (its centre crop)
    bgr: bool = False  # channel order; Caffe's models are BGR
    random_crop: bool = True  # in training; without it the centre crop
    flip: bool = True  # in training: mirror each picture with probability 1/2
    jitter: float = 0.1  # standard deviation of the colour draws; 0 switches the jitter off
    jitter_epochs: int | None = None  # jitter only in the first so many epochs; None is always
    jitter_rescale: bool = False  # divide jittered input by (1 + jitter), as the authors' code does in training


@dataclass(frozen=True)
class Network:
    """AlexNet's eight layers (paper, section 3); per-layer tuples run conv1..conv5, fc6..fc8."""

    lrn_size: int = 5  # the paper's n; 4 and 5 both span five channels, 0 leaves LRN out
    lrn_k: float = 2.0
    lrn_alpha: float = 1e-4
    lrn_alpha_over_n: bool = False  # divide alpha by lrn_size, as every released code does and the paper does not
    lrn_beta: float = 0.75
    relu_before_lrn: bool = True  # False: block 1 is conv, LRN, pool, ReLU (the authors' code)
    map_norm: bool = False  # a second normalisation after block 2's LRN, over 5x5 pixels of the same map
    pool_size: int = 3
    pool_stride: int = 2  # smaller than pool_size: overlapping (paper, section 3.4)
    final_relu: bool = False  # a ReLU after the last layer
    dropout_keep: float = 0.5  # probability that a unit of fc6, fc7 survives; 1 leaves dropout out
    dropout_scale_in_training: bool = False  # True: divide by keep in training (Caffe); False: multiply by it in test
    weight_std: tuple[float, ...] = (0.01,) * 8  # standard deviation of the initial weights; 0: sqrt(2 / fan-in) (He)
    bias: tuple[float, ...] = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)  # initial biases


@dataclass(frozen=True)
class Train:
    """Stochastic gradient descent (paper, section 5): v <- m v - d lr w - lr g; w <- w + v."""

    batch_size: int = 128
    epochs: int = 90
    lr: Schedule = ((0, 0.01), (30, 0.001), (55, 0.0001), (75, 0.00001))
    bias_lr: Schedule = ()  # learning rate of the biases; empty: bias_lr_factor times lr
    bias_lr_factor: float = 1.0
    conv1_lr: Schedule = ()  # learning rate of conv1's weights and biases where it applies; before its first entry: lr
    momentum: float = 0.9
    weight_decay: float = 5e-4
    bias_decay: bool = True  # weight decay on biases too
    checkpoint_every: int = 4000  # steps
    save_every: int = 1  # epochs from a checkpoint at an epoch's end to the next; the end of training has one anyway
    validate_every: int = 1  # epochs from a validation to the next; the last epoch is validated anyway
    log_every: int = 20  # steps
    order: str = "auto"  # of an epoch's pictures: uniform | blocks (for sets larger than memory) | auto: what fits
    plateau_steps: int = 500  # warn when the loss has stayed at ln(classes) for so many steps
    keep_checkpoints: int = 2  # newest so many, and the best


@dataclass(frozen=True)
class Eval:
    """How a checkpoint is evaluated, and in part how each epoch is validated."""

    batch_size: int = 256  # pictures; with 10 views so many crops are computed at a time
    views: int = 1  # 1: centre; 10: four corners and centre, mirrored, softmax averaged (paper, section 4.1)


@dataclass(frozen=True)
class Loader:
    """The threads that cut crops; None is what suits the device: one beside a network on the CPU, more beside a GPU."""

    slots: int | None = None  # batches in the ring
    threads: int | None = None  # that fill them


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    recipe: str  # name of the recipe they began as
    seed: int = 0
    preprocess: Preprocess = field(default_factory=Preprocess)
    input: Input = field(default_factory=Input)
    network: Network = field(default_factory=Network)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    loader: Loader = field(default_factory=Loader)


# The first author's sketch of the project: pixels on 0..1, LRN over n=4 (which spans five channels, like 5), a ReLU
# after the last layer. It did not say how weights start: He's rule here. It starts fc8's biases at 0, and then the last
# ReLU goes silent for good: once a class's scores are negative for all pictures, no gradient reaches them, and within
# twenty steps that is all classes. Starting at 1 keeps the scores positive, and the softmax does not see a shift that
# all classes share (docs/results.md has both runs).
SEED: Final = Config(
    recipe="seed",
    network=Network(
        lrn_size=4,
        final_relu=True,
        weight_std=(0.0,) * 7 + (0.01,),
        bias=(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    ),
)

# The paper's text, word for word. No released code used this combination; expect a long plateau at ln(1000) = 6.908.
PAPER: Final = Config(recipe="paper", input=Input(scale=1.0, mean="image"))

# The authors' own code, net 145, which gave the published 40.66 / 18.21 (10 views).
ORIGINAL: Final = Config(
    recipe="original",
    input=Input(border=(0, 3), scale=1.0, mean="center", jitter_epochs=67, jitter_rescale=True),
    network=Network(
        lrn_alpha_over_n=True,
        relu_before_lrn=False,
        map_norm=True,
        weight_std=(0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01),
    ),
    train=Train(
        epochs=91,
        lr=((0, 0.01), (25, 0.001), (51, 0.0001), (79, 0.00001)),
        bias_lr=((0, 0.02),),
        conv1_lr=((67, 0.00001), (72, 0.0)),
        bias_decay=False,
    ),
    eval=Eval(batch_size=128, views=10),
)

# Caffe's bvlc_alexnet: steps of 100,000 iterations of 256 pictures are 20 epochs of ILSVRC.
CAFFE: Final = Config(
    recipe="caffe",
    input=Input(crop=227, border=(0, 0), scale=1.0, mean="image", bgr=True, jitter=0.0),
    network=Network(
        lrn_k=1.0,
        lrn_alpha_over_n=True,
        dropout_scale_in_training=True,
        weight_std=(0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01),
        bias=(0.0, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.0),
    ),
    train=Train(
        batch_size=256,
        epochs=72,
        lr=((0, 0.01), (20, 0.001), (40, 0.0001), (60, 0.00001)),
        bias_lr_factor=2.0,
        bias_decay=False,
    ),
)

# The built-in demo set: the same network on easy pictures, in minutes on two cores.
DEMO: Final = Config(
    recipe="demo",
    preprocess=Preprocess(shard_images=256),
    input=Input(mean="image"),
    network=Network(lrn_alpha_over_n=True, dropout_scale_in_training=True, weight_std=(0.0,) * 8, bias=(0.0,) * 8),
    train=Train(batch_size=32, epochs=4, lr=((0, 0.01), (2, 0.003), (3, 0.0005)), checkpoint_every=1000, log_every=10),
    eval=Eval(batch_size=64),
)

RECIPES: Final[dict[str, Config]] = {c.recipe: c for c in (SEED, PAPER, ORIGINAL, CAFFE, DEMO)}


def load_config(recipe: str) -> Config:
    """The recipe of this name; refuses an unknown one with the nearest that exists."""
    if recipe not in RECIPES:
        raise PipelineError(f"there is no recipe {recipe!r}{_nearest(recipe, RECIPES)}; there are {', '.join(RECIPES)}")
    return RECIPES[recipe]


def override(
    config: Config, toml: Path | None = None, settings: list[str] | None = None, seed: int | None = None
) -> Config:
    """Change single fields: by a TOML file, then by ``key=value`` settings, then the seed.

    Raises
    ------
    PipelineError
        Unreadable file, unknown key, value of the wrong type or out of range.
    """
    return changes(toml, settings, seed)(config)


def changes(
    toml: Path | None = None, settings: list[str] | None = None, seed: int | None = None
) -> Callable[[Config], Config]:
    """:func:`override` for several configurations; the file is read once, as it may be a pipe."""
    entries = [] if toml is None else _read_toml(toml)

    def change(config: Config) -> Config:
        for key, value in entries:
            if key == "recipe":
                raise PipelineError(f"{toml}: a recipe is many settings at once; name it with --recipe, not in a file")
            config = _with_value(config, key, value, where=str(toml))
        for setting in settings or []:
            key, sign, text = setting.partition("=")
            if key.strip() == "recipe":
                raise PipelineError(f"--set {setting}: a recipe is many settings at once; name it with --recipe")
            if not sign:
                raise PipelineError(
                    f"--set {setting} has no '='; write --set key=value, for example --set train.batch_size=64"
                )
            config = _with_value(config, key.strip(), _parse(text.strip()), where=f"--set {setting}")
        if seed is not None:
            config = _with_value(config, "seed", seed, where="--seed")
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
        config = _with_value(config, key, value, where=where)
    return config


def keys() -> list[str]:
    """All configuration keys that can be set, such as ``train.batch_size``."""
    return [key for key, _ in flatten(dataclasses.asdict(SEED)) if key != "recipe"]


def difference(a: Config, b: Config) -> list[str]:
    """The keys in which two configurations differ, each with both values: ``a``'s "there", ``b``'s "here"."""
    left, right = dict(flatten(dataclasses.asdict(a))), dict(flatten(dataclasses.asdict(b)))
    return [f"{key} ({left[key]} there, {right[key]} here)" for key in left if left[key] != right[key]]


def at_epoch(schedule: Schedule, epoch: int) -> float | None:
    """The schedule's value in ``epoch``, None before its first entry."""
    value = None
    for first, entry in schedule:
        if epoch >= first:
            value = entry
    return value


def _read_toml(path: Path) -> list[tuple[str, Any]]:
    try:
        # Some editors begin a file with an invisible mark, which TOML does not know.
        return list(flatten(tomllib.loads(path.read_text("utf-8-sig"))))
    except OSError as error:
        raise PipelineError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path} is not valid TOML: {error}") from error


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


def _nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _with_value(config: Any, key: str, value: Any, where: str, whole: str | None = None) -> Any:
    whole = whole or key
    name, _, rest = key.partition(".")
    types_of = typing.get_type_hints(type(config))
    if name not in types_of or bool(rest) != is_dataclass(getattr(config, name)):
        raise PipelineError(
            f"{where}: there is no configuration key {whole!r}{_nearest(whole, keys())}; "
            "pipeline/config.py lists all: batch_size in its class Train is train.batch_size, and so on"
        )
    if rest:
        return replace(config, **{name: _with_value(getattr(config, name), rest, value, where, whole)})
    return replace(config, **{name: _coerce(value, types_of[name], whole, where)})


def _coerce(value: Any, wanted: Any, key: str, where: str) -> Any:
    """Accept ``value`` as ``wanted`` (int for float, list for tuple, nothing else), or say what was expected."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for option in options:
        # As text, "none" stands for nothing only where nothing is a value: input.mean=none is a word like any other.
        if option is type(None) and (value is None or value == "none"):
            return None
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
    int | None: "a whole number or none",
    tuple[int, int]: "two whole numbers such as [2, 1]",
    tuple[float, ...]: "a list of numbers such as [0.01, 0.03]",
    Schedule: "a list of first epochs and values such as [[0, 0.01], [30, 0.001]]",
    tuple[int, float]: "pairs of a first epoch and a value such as [0, 0.01]",
}


def _check(config: Config, file: str | None = None) -> None:
    """Refuse values that no stage could work with; ``file`` is where they may have come from."""
    inp, net, train = config.input, config.network, config.train
    side = inp.crop + sum(inp.border)
    rules = [
        (config.seed >= 0 and config.seed < 2**63, "seed must lie between 0 and 2^63 - 1"),
        (config.preprocess.size >= inp.crop, "input.crop must not exceed preprocess.size"),
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
        (min(inp.jitter, inp.jitter_epochs or 0) >= 0, "input.jitter and input.jitter_epochs must not be negative"),
        (len(net.weight_std) == 8 and min(net.weight_std) >= 0, "network.weight_std needs eight values, none negative"),
        (len(net.bias) == 8, "network.bias needs eight values"),
        (0 < net.dropout_keep <= 1, "network.dropout_keep must lie in (0, 1]"),
        (
            0 <= net.lrn_size <= 512 and net.lrn_k > 0,
            "network.lrn_size must lie between 0 and 512, network.lrn_k above 0",
        ),
        (net.lrn_alpha >= 0, "network.lrn_alpha must not be negative"),
        (1 <= train.batch_size <= 65536, "train.batch_size must lie between 1 and 65536"),
        (1 <= config.eval.batch_size <= 65536, "eval.batch_size must lie between 1 and 65536"),
        (config.eval.views in (1, 10), "eval.views must be 1 or 10"),
        (train.order in ("auto", "uniform", "blocks"), "train.order must be auto, uniform or blocks"),
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
