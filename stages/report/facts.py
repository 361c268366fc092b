"""What a run's files say, as plain numbers: metrics, evaluation, data, weights."""

from __future__ import annotations

import shlex
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

import numpy as np

from data.manifest import read_manifest
from data.origin import made_from
from data.sampling import steps_per_epoch
from net.backend import DEVICES
from pipeline.config import RECIPES, Config
from pipeline.config_values import as_text, flatten, to_dict, with_values
from pipeline.errors import PipelineError
from pipeline.metrics import has_numbers, read_metrics, training_lines
from pipeline.run_dir import RunDir, hash_file, read_json
from stages.trained import Trained, label

# What NumPy and zipfile raise for a damaged .npz file, an odd compression method and a claim of encryption included.
_UNREADABLE: Final = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    TypeError,
)
MOST_REJECTS: Final = 100  # rows shown
MOST_PAIRS: Final = 15
_PACKAGES: Final = ("numpy", "scipy", "numba", "pillow", "h5py", "safetensors", "cupy-cuda12x", "cupy-cuda13x")


@dataclass(frozen=True)
class Facts:
    """A run in numbers.

    ``steps`` are the training lines of metrics.jsonl, ``validations`` those with accuracies; ``evaluation`` is
    eval/metrics.json, ``predictions`` the arrays beside it, both None before the first evaluation.
    """

    run: RunDir
    config: Config
    step: int
    seal: str
    checkpoint: str
    classes: list[dict[str, Any]]
    manifest: dict[str, Any]
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    predictions: dict[str, np.ndarray] | None
    device: str = ""  # what it was trained on and in, as its checkpoint says
    precision: str = "fp32"
    imported: str = ""  # the file whose weights it has, where it was not trained here

    @property
    def name(self) -> str:
        return self.run.root.name

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.manifest["splits"]["train"]["images"], self.config.train.batch_size)

    def label(self, number: int) -> str:
        """A class as a person knows it."""
        return label(self.classes[number], number)

    def epoch(self, step: int) -> float:
        """Epochs done after ``step`` steps."""
        return step / self.steps_per_epoch

    @property
    def rate(self) -> float | None:
        """Median of the images trained on in a second."""
        rates = [record["images_per_second"] for record in self.steps]
        return float(np.median(rates)) if rates else None


def read_facts(run: RunDir, trained: Trained) -> Facts:
    """Read what there is of a run; what has not been made yet is left empty."""
    steps, validations = training_lines(read_metrics(run.train / "metrics.jsonl"))
    evaluation, predictions = _evaluation(run, len(trained.classes))
    origin = trained.header.get("imported")
    return Facts(
        run=run,
        config=trained.config,
        step=trained.step,
        seal=trained.seal,
        checkpoint=trained.path.name,
        classes=trained.classes,
        manifest=read_manifest(run),
        steps=steps,
        validations=validations,
        evaluation=evaluation,
        predictions=predictions,
        device=str(trained.header.get("device", "")),
        precision=str(trained.header.get("precision", "fp32")),
        imported=str(origin.get("file", "")) if isinstance(origin, dict) else "",
    )


def _evaluation(run: RunDir, classes: int) -> tuple[dict[str, Any] | None, dict[str, np.ndarray] | None]:
    path = run.eval / "metrics.json"
    if not path.exists():
        return None, None
    remedy = f"make it again: python run_pipeline.py --stage eval {run.flag}"
    evaluation = read_json(path, remedy)
    try:
        # Opened here, because NumPy leaves a file open that turns out to be no archive.
        with (
            open(run.eval / "predictions.npz", "rb") as file,
            np.load(file, allow_pickle=False) as arrays,
        ):
            predictions = {name: arrays[name] for name in ("labels", "top", "probability", "loss")}
        count = len(predictions["labels"])
        sound = (
            has_numbers(evaluation, "images", "loss", "top1", "top5", "views", "step")
            and evaluation["images"] == count
            and predictions["labels"].shape == predictions["loss"].shape == (count,)
            and predictions["top"].shape == predictions["probability"].shape == (count, min(5, classes))
            and all(
                a.dtype.kind == "i" and a.min() >= 0 and a.max() < classes
                for a in (predictions["labels"], predictions["top"])
            )
        )
    except _UNREADABLE as error:
        raise PipelineError(f"{run.eval / 'predictions.npz'} cannot be read ({error}); {remedy}") from error
    if not sound:
        raise PipelineError(f"{run.eval} is damaged: its files do not fit together; {remedy}")
    return evaluation, predictions


def per_class(facts: Facts) -> list[dict[str, Any]]:
    """A row a class that has pictures: accuracy, and the class it is most often taken for."""
    if facts.predictions is None:
        return []
    labels, top = facts.predictions["labels"], facts.predictions["top"]
    rows = []
    for number in np.unique(labels).tolist():
        mine = labels == number
        first = top[mine, 0]
        wrong = Counter(first[first != number].tolist()).most_common(1)
        rows.append(
            {
                "name": facts.label(number),
                "words": facts.classes[number].get("words") or "",
                "wnid": facts.classes[number].get("wnid") or "",
                "images": int(mine.sum()),
                "top1": float(np.mean(first == number)),
                "top5": float(np.mean(np.any(top[mine] == number, axis=1))),
                "taken_for": facts.label(wrong[0][0]) if wrong else "",
                "taken_for_count": wrong[0][1] if wrong else 0,
            }
        )
    return rows


def confusions(facts: Facts) -> list[dict[str, Any]]:
    """The pairs (class, what it is taken for) that happen most often, most first."""
    if facts.predictions is None:
        return []
    labels, first = facts.predictions["labels"], facts.predictions["top"][:, 0]
    wrong = labels != first
    pairs = Counter(zip(labels[wrong].tolist(), first[wrong].tolist(), strict=True))
    sizes = np.bincount(labels, minlength=len(facts.classes))
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:MOST_PAIRS]
    return [
        {
            "true": facts.label(true),
            "said": facts.label(said),
            "count": count,
            "share": count / int(sizes[true]),
            "back": pairs.get((said, true), 0),
        }
        for (true, said), count in ordered
    ]


def confident(facts: Facts, *, right: bool, most: int) -> list[int]:
    """Rows of the validation split the network was most sure of, surest first.

    Of the right ones at most one a class, since often one easy class fills all places; of the wrong ones all.
    """
    if facts.predictions is None:
        return []
    labels = facts.predictions["labels"]
    hit = facts.predictions["top"][:, 0] == labels
    order = np.argsort(-facts.predictions["probability"][:, 0], kind="stable")
    rows = order[hit[order] == right]
    if right:
        firsts = np.unique(labels[rows], return_index=True)[1]
        rows = rows[np.sort(firsts)]
    return rows[:most].tolist()


def norms(trained: Trained) -> list[dict[str, Any]]:
    """A row a layer: mean |w|, mean |dw| of the last update, their ratio, for weights and biases.

    The diagnostic the authors' code prints; dw is the momentum v, which the update adds to w.
    """
    rows = []
    for name in trained.parameters:
        if not name.endswith(".w"):
            continue
        row: dict[str, Any] = {"layer": name[:-2]}
        for kind in ("w", "b"):
            value, update = trained.parameters[f"{name[:-2]}.{kind}"], trained.momenta.get(f"{name[:-2]}.{kind}")
            size = float(np.mean(np.abs(value), dtype=np.float64))
            change = float(np.mean(np.abs(update), dtype=np.float64)) if update is not None else None
            row[kind] = {
                "size": size,
                "change": change,
                "ratio": change / size if change is not None and size else None,
            }
        rows.append(row)
    return rows


def rejects(facts: Facts) -> list[dict[str, Any]]:
    """The pictures that preprocessing left out, each with split, name and reason."""
    return read_metrics(facts.run.preprocess / "rejects.jsonl")


def settings(config: Config) -> list[dict[str, Any]]:
    """Every setting, and what the recipe has where this run differs.

    An order that the recipe leaves open ("auto") was settled when training began, and is no change.
    """
    standard = dict(flatten(to_dict(RECIPES[config.recipe]))) if config.recipe in RECIPES else {}
    return [
        {
            "key": key,
            "value": value,
            "recipe": standard.get(key),
            "changed": key in standard and standard[key] not in (value, "auto"),
        }
        for key, value in flatten(to_dict(config))
    ]


def commands(facts: Facts) -> list[str]:
    """The command lines that make this run again."""
    prepared = with_values(facts.config, facts.manifest.get("made_with", {}), str(facts.run.preprocess))
    # A settled order is named all the same: with other memory it might be settled otherwise.
    named = [s for s in settings(prepared) if s["changed"] or s["recipe"] == "auto" != s["value"]]
    changed = [s for s in named if s["key"] != "seed"]
    options = "".join(f" --set {shlex.quote(s['key'] + '=' + as_text(s['value']))}" for s in changed)
    if prepared.seed:
        options = f" --seed {prepared.seed}{options}"
    reseeded = f" --seed {facts.config.seed}" if facts.config.seed != prepared.seed else ""
    pictures = made_from(facts.run)
    source = "" if pictures is None else f" --source {shlex.quote(pictures)}"
    where = f" {facts.run.flag}"
    computing = f" --device {facts.device}" if facts.device in DEVICES else ""
    if computing and facts.precision in ("tf32", "bf16"):
        computing += f" --precision {facts.precision}"
    lines = [f"python run_pipeline.py --stage preprocess{source}{where} --recipe {facts.config.recipe}{options}"]
    if facts.imported:
        lines.append(f"python run_pipeline.py --stage import {shlex.quote(facts.imported)}{where}")
    else:
        lines.append(f"python run_pipeline.py --stage train --steps {facts.step}{where}{reseeded}{computing}")
    if facts.evaluation is not None:
        lines.append(f"python run_pipeline.py --stage eval --views {facts.evaluation['views']}{where}{computing}")
    return [*lines, f"python run_pipeline.py --stage report{where}{computing}"]


def versions(trained: Trained) -> list[tuple[str, str]]:
    """Packages at work now, and what the checkpoint says it was trained with."""
    installed = []
    for package in _PACKAGES:
        try:
            installed.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    known = [
        (f"trained with {key}", str(trained.header[key]))
        for key in ("device", "precision", "python", "numpy")
        if key in trained.header
    ]
    return [*known, *installed]


def hashes(facts: Facts, trained: Trained) -> list[tuple[str, str]]:
    """Fingerprints that tell whether two runs had the same pictures, settings and weights."""
    manifest, begun = facts.manifest, trained.header.get("pretrained")
    weights = []
    if isinstance(begun, dict):
        weights = [(f"weights it began with, {begun.get('file')} (SHA-256 of the file)", str(begun.get("sha256")))]
    return [
        ("pictures (fingerprint of the source)", manifest["source"]),
        ("preprocessing settings", manifest["settings"]),
        ("shards (pictures, settings, decoder)", manifest["plan"]),
        *weights,
        (f"{trained.path.name} (SHA-256 of the file)", hash_file(trained.path)),
    ]
