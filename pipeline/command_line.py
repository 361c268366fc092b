"""The command line: which flags there are, which stage each matters to, and the help a person sees.

Every flag is accepted with every stage and in any order, and a note names those that do not matter to it. ``--help``
alone shows all of them; together with ``--stage X`` it shows that stage's flags and examples only.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.config import RECIPES


@dataclass(frozen=True)
class Stage:
    """A stage as the help shows it; ``files`` says what stands behind the flags, empty for nothing."""

    summary: str
    description: str
    examples: tuple[tuple[str, str], ...]  # arguments after run_pipeline.py, what they do
    files: str = ""


IN_ORDER: Final = ("preprocess", "train", "eval", "report")
STAGES: Final[dict[str, Stage]] = {
    "preprocess": Stage(
        "pictures -> shards",
        "Read the pictures where they are (official archives, a tar or a folder a class, validation pictures in one "
        "folder, or Kaggle's tree; see docs/data.md), resize each to 256x256 and write HDF5 shards, colour statistics "
        "and the list of rejected pictures to <run>/preprocess/. "
        "Without any source the built-in demo set is drawn and used.",
        (
            ("--stage preprocess", "the demo set, or datasets/ilsvrc2012 where that exists"),
            ("--stage preprocess --source /data/ilsvrc2012 --run runs/ilsvrc --jobs 8", "ILSVRC-2012"),
            ("--stage preprocess --source /data/ilsvrc2012 --scheduler tcp://head:8786", "on the workers of a cluster"),
        ),
    ),
    "train": Stage(
        "shards -> checkpoints",
        "Train the recipe's network on the shards and write checkpoints and metrics.jsonl to <run>/train/. "
        "Ctrl-C saves before it stops; --resume goes on from there to the same weights, bit for bit.",
        (
            ("--stage train", "to the end of the recipe"),
            ("--stage train --resume", "go on after a stop or a crash"),
            ("--stage train --resume --epochs 2", "two epochs more"),
            ("--stage train --run runs/caffe --recipe caffe --set train.batch_size=128", "another recipe, one change"),
            (
                "--stage train --run runs/mine --weights runs/caffe/train/step-00360000.ckpt --epochs 5 "
                "--set train.lr=0.001",
                "fine-tune a trained network on pictures of your own, preprocessed in runs/mine",
            ),
        ),
    ),
    "watch": Stage(
        "a run in progress, in the terminal",
        "Show the last metrics, the remaining time and the loss curve of a run that another process trains; once, "
        "where the output is no terminal. Ctrl-C ends the view, not the run.",
        (("--stage watch --run runs/ilsvrc", "look again every two seconds"),),
    ),
    "eval": Stage(
        "a checkpoint -> accuracy",
        "Evaluate a checkpoint on every validation picture and write metrics.json, per_class.csv and predictions.npz "
        "to <run>/eval/.",
        (
            ("--stage eval", "the newest checkpoint, as many views as its settings say"),
            ("--stage eval --checkpoint best --views 10", "the paper's protocol (section 4.1)"),
        ),
    ),
    "verify": Stage(
        "checks every file of a run",
        "Compare every shard, checkpoint, manifest and index of a run with its checksum, name what is damaged and the "
        "command that mends it; the exit status is then 1. Nothing is changed but a note for --stage preprocess, which "
        "makes exactly the damaged shards again.",
        (("--stage verify --run runs/ilsvrc", "at the speed of the disk"),),
    ),
    "predict": Stage(
        "pictures of your own -> the five most probable classes",
        "Name the five most probable classes of pictures, in any format that Pillow reads, turned upright as their "
        "EXIF data say. Folders are searched with their subfolders, - is standard input. Pictures that cannot be read "
        "are reported, the others still shown, and "
        "the exit status is then 1.",
        (
            ("--stage predict cat.jpg holiday/", "bars in the terminal"),
            ("--stage predict --json --views 10 photos/ > photos.jsonl", "a JSON object a picture, one a line"),
            ("--stage predict - < cat.jpg", "a picture from standard input"),
        ),
        "IMAGE...",
    ),
    "report": Stage(
        "one HTML page about a run",
        "Write <run>/report/index.html, one page with everything inside, and its pictures as PNG files: curves, "
        "accuracy of each class, confusions, confident right and wrong pictures, filters, activation maps, data, "
        "configuration. --compare writes compare.html with several runs side by side.",
        (
            ("--stage report --run runs/ilsvrc", "runs/ilsvrc/report/index.html"),
            ("--stage report --run runs/paper --compare runs/caffe", "runs/paper/report/compare.html with both"),
        ),
    ),
    "export": Stage(
        "a checkpoint -> safetensors, PyTorch's layout or ONNX",
        "Write a checkpoint's weights to <run>/export/ in a format that other programs read; docs/formats.md has the "
        "names and shapes, and a PyTorch module that loads them.",
        (
            ("--stage export", "alexnet.safetensors, this project's names"),
            ("--stage export --format torch --checkpoint best", "PyTorch's names and layout"),
            ("--stage export --format onnx", "a checked ONNX model (needs pip install '.[export]')"),
        ),
    ),
    "import": Stage(
        "weights from elsewhere -> a checkpoint",
        "Make a new run's checkpoint from a safetensors file (this project's names or PyTorch's), from a checkpoint of "
        "another run or from Caffe's bvlc_alexnet.caffemodel; see docs/formats.md.",
        (
            ("--stage import alexnet.safetensors --run runs/imported", "weights that --stage export wrote"),
            ("--stage import bvlc_alexnet.caffemodel --run runs/caffe", "Caffe's published AlexNet"),
            (
                "--stage import bvlc_alexnet.caffemodel --mean imagenet_mean.binaryproto --run runs/caffe",
                "the same with Caffe's own mean image",
            ),
        ),
        "FILE",
    ),
}


_OVERVIEW: Final = (
    "AlexNet by hand: from pictures to a measured network. Without --stage the stages "
    f"{', '.join(IN_ORDER)} run in order, on the built-in demo set where no data are found."
)
_EXAMPLES: Final = (
    ("", "everything, on the demo set or datasets/ilsvrc2012"),
    ("--source /data/ilsvrc2012 --run runs/ilsvrc --recipe original", "everything, on ILSVRC-2012"),
    ("--stage train --help", "the flags of one stage, with examples"),
)


@dataclass(frozen=True)
class _Flag:
    name: str
    stages: tuple[str, ...]
    help: str
    options: dict[str, Any]


_ALL: Final = tuple(STAGES)
_COMPUTE: Final = ("train", "eval", "predict", "report", "export")
_TRAINED: Final = ("eval", "predict", "report", "export")
_CONFIGURED: Final = ("preprocess", "train", "eval", "import")


def at_least_one(text: str) -> int:
    """A number of things, as a flag takes it."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number of at least 1, not {text!r}")
    return int(text)


def _name(text: str) -> str:
    """A file or folder. As a path the empty one that a script's unset variable leaves would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("takes a name, and this one is empty")
    return text


def _file(text: str) -> Path:
    return Path(_name(text))


_FLAGS: Final = (
    _Flag(
        "--source",
        ("preprocess",),
        "archives, folders or Kaggle's tree (default $ILSVRC2012_ROOT, else datasets/ilsvrc2012, else the demo set)",
        {"type": _name, "metavar": "DIR"},
    ),
    _Flag("--jobs", ("preprocess",), "processes (default: one a core)", {"type": at_least_one, "metavar": "N"}),
    _Flag(
        "--check-archives",
        ("preprocess",),
        "first compare the ILSVRC archives with their published MD5 sums",
        {"action": "store_true"},
    ),
    _Flag(
        "--scheduler",
        ("preprocess",),
        "let the workers of this Dask scheduler do the work, such as tcp://host:8786 (needs pip install '.[cluster]')",
        {"metavar": "ADDRESS"},
    ),
    _Flag("--resume", ("train",), "go on from the newest checkpoint", {"action": "store_true"}),
    _Flag("--restart", ("train",), "start over; old checkpoints are moved aside", {"action": "store_true"}),
    _Flag(
        "--weights",
        ("train",),
        "begin with the weights in FILE (.ckpt, .safetensors or .caffemodel) instead of random ones; without --recipe "
        "the network is the file's, and the last layer is drawn anew where the classes are others",
        {"type": _file, "metavar": "FILE"},
    ),
    _Flag("--epochs", ("train",), "train N epochs more, then stop", {"type": at_least_one, "metavar": "N"}),
    _Flag("--steps", ("train",), "train N steps more, then stop", {"type": at_least_one, "metavar": "N"}),
    _Flag(
        "--tensorboard",
        ("train",),
        "write the metrics as TensorBoard events too (needs pip install '.[tensorboard]')",
        {"action": "store_true"},
    ),
    _Flag(
        "--views",
        ("eval", "predict"),
        "1: centre; 10: corners and centre, mirrored too (default: eval.views of the checkpoint's settings)",
        {"type": int, "choices": (1, 10), "metavar": "N"},
    ),
    _Flag(
        "--checkpoint",
        _TRAINED,
        "latest, best or a file (default %(default)s)",
        {"type": _name, "default": "latest", "metavar": "WHICH"},
    ),
    _Flag("--json", ("predict",), "one JSON object a picture and line", {"action": "store_true"}),
    _Flag(
        "--format",
        ("export",),
        "safetensors, torch or onnx (default %(default)s)",
        {"choices": ("safetensors", "torch", "onnx"), "default": "safetensors", "metavar": "NAME"},
    ),
    _Flag(
        "--compare",
        ("report",),
        "other runs to show beside this one",
        {"type": _name, "nargs": "+", "action": "extend", "metavar": "RUN", "default": []},
    ),
    _Flag("--mean", ("import",), "Caffe's mean image, a .binaryproto", {"type": _file, "metavar": "FILE"}),
    _Flag(
        "--device",
        _COMPUTE,
        "auto, cpu, gpu or reference, the plain NumPy textbook (default %(default)s: the GPU where one works)",
        {"choices": ("auto", "cpu", "gpu", "reference"), "default": "auto", "metavar": "NAME"},
    ),
    _Flag(
        "--precision",
        _COMPUTE,
        "fp32, tf32 or bf16: the GPU's arithmetic in matrix products (default %(default)s)",
        {"choices": ("fp32", "tf32", "bf16"), "default": "fp32", "metavar": "NAME"},
    ),
    _Flag(
        "--recipe",
        ("preprocess", "train", "import"),
        f"{', '.join(RECIPES)} (default: the run's own, else seed, or demo on the demo set; import: the file's own, or "
        "caffe for a .caffemodel)",
        {"metavar": "NAME"},
    ),
    _Flag("--config", _CONFIGURED, "change settings by a TOML file", {"type": _file, "metavar": "FILE.toml"}),
    _Flag(
        "--set",
        _CONFIGURED,
        "change one setting, such as train.batch_size=64; may be repeated",
        {"action": "append", "metavar": "KEY=VALUE"},
    ),
    _Flag(
        "--seed",
        ("preprocess", "train", "import"),
        "seed of everything random (default 0)",
        {"type": int, "metavar": "N"},
    ),
    _Flag(
        "--run",
        _ALL,
        "run directory (default %(default)s)",
        {"type": _name, "default": "runs/default", "metavar": "DIR"},
    ),
    _Flag("--debug", _ALL, "show the traceback of an error", {"action": "store_true"}),
)
# These name settings, and eval itself says which of those it does not use.
_TOLD_BY_STAGE: Final = {"eval": ("--recipe", "--seed")}
_EXCLUSIVE: Final = (("--epochs", "--steps"), ("--resume", "--restart"), ("--jobs", "--scheduler"))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; prints help or what is wrong and exits (0 or 2) where argparse does.

    ``files`` of the result holds the arguments that are not flags.
    """
    finder = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    finder.add_argument("--stage", choices=tuple(STAGES))
    try:
        stage = finder.parse_known_args(arguments)[0].stage
    except argparse.ArgumentError:
        stage = None  # the parser below says what is wrong with it
    parser = _parser(stage)
    options = parser.parse_intermixed_args(arguments)
    for one, other in _EXCLUSIVE:
        if getattr(options, one[2:]) and getattr(options, other[2:]):
            parser.error(f"argument {other}: not allowed with argument {one}")
    takes = STAGES[stage].files if stage else ""
    if options.files and not takes:
        parser.error(f"unrecognized arguments: {' '.join(options.files)}")
    if takes and not options.files:
        parser.error(f"--stage {stage} needs {takes}")
    if takes == "FILE" and len(options.files) > 1:
        parser.error(f"--stage {stage} takes one file, not {len(options.files)}")
    return options


def without_effect(options: argparse.Namespace) -> list[str]:
    """The flags given, with other values than their defaults, that matter to no stage that is to run."""
    stages = {options.stage} if options.stage else set(IN_ORDER)
    told = _TOLD_BY_STAGE.get(options.stage, ())
    idle = [flag for flag in _FLAGS if not stages.intersection(flag.stages) and flag.name not in told]
    values = {flag.name: getattr(options, flag.name[2:].replace("-", "_")) for flag in idle}
    return [flag.name for flag in idle if (values[flag.name] or None) != (flag.options.get("default") or None)]


def _parser(stage: str | None) -> argparse.ArgumentParser:
    """The parser; flags that do not matter to ``stage`` are accepted but not shown."""
    width = max(20, min(shutil.get_terminal_size().columns, 110) - 2)
    parser = argparse.ArgumentParser(
        usage=_usage(stage),
        description=_description(stage, width),
        epilog=_examples(stage),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=width),
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="*", type=_name, help=argparse.SUPPRESS)
    group = functools.cache(parser.add_argument_group)  # one for each title, in the order they are first asked for
    hidden = argparse.SUPPRESS
    for flag in _FLAGS:
        title = "flags" if stage else ("every stage" if flag.stages == _ALL else ", ".join(flag.stages))
        shown = flag.help if stage in (None, *flag.stages) else hidden
        group(title).add_argument(flag.name, help=shown, **flag.options)
    common = group("flags" if stage else "every stage")
    only = hidden if stage else "run this stage only"
    common.add_argument("--stage", choices=tuple(STAGES), metavar="NAME", help=only)
    common.add_argument("-h", "--help", action="help", help="show this help")
    return parser


def _usage(stage: str | None) -> str:
    if stage is None:
        return "python run_pipeline.py [--stage NAME] [flags]\n       python run_pipeline.py --stage NAME --help"
    files = STAGES[stage].files
    return f"python run_pipeline.py --stage {stage}{f' {files}' if files else ''} [flags]"


def _description(stage: str | None, width: int) -> str:
    if stage is not None:
        return textwrap.fill(STAGES[stage].description, width)
    summaries = [f"  {name:<21} {entry.summary}" for name, entry in STAGES.items()]
    return "\n".join([textwrap.fill(_OVERVIEW, width), "", "stages:", *summaries])


def _examples(stage: str | None) -> str:
    """Command lines to copy, each below what it does."""
    lines = ["examples:"]
    for arguments, what in STAGES[stage].examples if stage else _EXAMPLES:
        lines += [f"  # {what}", f"  python run_pipeline.py{f' {arguments}' if arguments else ''}"]
    return "\n".join(lines)
