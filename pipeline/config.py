"""Every number of a run in frozen dataclasses, and the recipes that fill them.

A recipe is a complete :class:`Config`. How single fields are changed, and what values they take, is in
``config_values.py``.

Schedules are tuples of ``(first epoch, value)``, epochs counted from 0; the value holds until the next entry. Settings
give one value for all epochs as a number alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from pipeline.errors import PipelineError

Schedule = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Preprocess:
    """How source pictures become shards."""

    size: int = 256  # side of the stored square: short side resized to it, centre cropped (paper, section 2)
    filter: str = "bicubic"  # resampling filter of the resize
    decoder: str = "pillow"  # pillow | simplejpeg (an extra): who decodes the JPEGs
    upright: bool = False  # turn pictures as their EXIF data say; ImageNet's baselines do not
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


LAYERS: Final = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")  # those with parameters


@dataclass(frozen=True)
class Network:
    """AlexNet's eight layers (paper, section 3); per-layer tuples run conv1..conv5, fc6..fc8."""

    lrn_size: int = 5  # the paper's n; 4 and 5 both span five channels, 0 leaves LRN out
    lrn_k: float = 2.0
    lrn_alpha: float = 1e-4
    lrn_alpha_over_n: bool = False  # divide alpha by lrn_size, as the authors' code and Caffe do
    lrn_beta: float = 0.75
    relu_before_lrn: bool = True  # False: block 1 is conv, LRN, pool, ReLU (the authors' code)
    map_norm: bool = False  # a second normalisation after block 2's LRN, over 5x5 pixels of the same map
    pool_size: int = 3
    pool_stride: int = 2  # smaller than pool_size: overlapping (paper, section 3.4)
    fc_units: int = 4096  # units of fc6 and of fc7, which hold most of the weights (section 3.5)
    final_relu: bool = False  # a ReLU after the last layer
    dropout_keep: float = 0.5  # probability that a unit of fc6, fc7 survives; 1 leaves dropout out
    dropout_scale_in_training: bool = False  # True: divide by keep in training (Caffe); False: multiply at test time
    weight_std: tuple[float, ...] = (0.01,) * 8  # standard deviation of the initial weights; 0: sqrt(2 / fan-in) (He)
    bias: tuple[float, ...] = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)  # initial biases


@dataclass(frozen=True)
class Train:
    """Stochastic gradient descent (paper, section 5): v <- m v - d lr w - lr g; w <- w + v."""

    weights: str | None = None  # file whose weights training begins with (stages/pretrained.py); none: drawn anew
    frozen: tuple[str, ...] = ()  # layers that keep the weights they begin with, such as conv1 and conv2
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
    log_every: int = 20  # steps; the last one of a start has a line anyway
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


# This project's first sketch: pixels on 0..1, LRN over n=4 (which spans five channels, like 5), a ReLU after the last
# layer. It did not say how weights start: He's rule here. With fc8's biases at 0, as it had them, the last ReLU goes
# silent for good: once a class's scores are negative for all pictures, no gradient reaches them, and within twenty
# steps that is all classes. Starting at 1 keeps the scores positive, and the softmax does not see a shift that all
# classes share (docs/results.md has both runs).
SEED: Final = Config(
    recipe="seed",
    network=Network(
        lrn_size=4,
        final_relu=True,
        weight_std=(0.0,) * 7 + (0.01,),
        bias=(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    ),
)

# The paper's text, word for word, but for the epochs at which the rate is lowered: the paper names none ("when the
# validation error rate stopped improving", three times; section 5), those of Train.lr are this project's choice. No
# released code used this combination; expect a long plateau at ln(1000) = 6.908.
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
        raise PipelineError(f"there is no recipe {recipe!r}{nearest(recipe, RECIPES)}; there are {', '.join(RECIPES)}")
    return RECIPES[recipe]


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of a sentence on a word that does not exist: the one that may have been meant, if any comes near."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def at_epoch(schedule: Schedule, epoch: int) -> float | None:
    """The schedule's value in ``epoch``, None before its first entry."""
    value = None
    for first, entry in schedule:
        if epoch >= first:
            value = entry
    return value
