"""The report: one HTML page that shows a run, with everything it needs inside, and its pictures as PNG files.

``facts`` reads the numbers, ``charts`` and ``pictures`` make what is shown of them, ``page.html.j2`` with ``page.css``
and ``page.js`` puts it on a page. ``compare`` does the same for several runs beside each other.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from data.dataset import Dataset, open_dataset
from data.split import Split
from net.backend import DEVICES
from pipeline.config_values import as_text
from pipeline.run_dir import RunDir, make_folder, write_bytes
from stages.eval import TOP, evaluate
from stages.report import charts, facts, pictures
from stages.report.facts import Facts
from stages.trained import Trained, load_trained

PHOTOS: Final = 8  # shown of the most confident right and wrong ones each
ACTIVATIONS: Final = 3  # pictures whose activation maps are shown
SAMPLE: Final = 256  # training pictures the last checkpoint is tried on
_HERE: Final = Path(__file__).parent


def run(run_dir: RunDir, ops: ModuleType, *, checkpoint: str) -> Path:
    """Write ``<run>/report/index.html`` and its PNG files; returns the page's path.

    Raises
    ------
    PipelineError
        There is no usable checkpoint or no shards, or files of the run do not fit together.
    """
    dataset = open_dataset(run_dir)
    trained = load_trained(run_dir, checkpoint, dataset)
    known = facts.read_facts(run_dir, trained)
    folder = make_folder(run_dir.report)
    sample = _sample(trained, dataset, ops)
    curves = charts.charts([known], sample["top1"])
    shown = _shown(known, dataset, trained, ops)
    page = _template("page.html.j2").render(
        run=known,
        made=_now(),
        checkpoint=trained.header,
        tiles=_tiles(known, trained),
        sample=sample,
        charts={chart.key: chart.data() for chart in curves},
        classes=facts.per_class(known),
        confusions=facts.confusions(known),
        norms=facts.norms(trained),
        rejects=facts.rejects(known),
        most_rejects=facts.MOST_REJECTS,
        color=_color(dataset),
        settings=facts.settings(known.config),
        commands=facts.commands(known),
        versions=facts.versions(trained),
        hashes=facts.hashes(known, trained),
        **shown.page,
    )
    files = {"index.html": _as_bytes(page), **shown.files}
    if curves:
        files["curves.png"] = charts.curves_png(curves)
    for name, data in files.items():
        write_bytes(folder / name, data)
    print(f"report: {folder / 'index.html'} ({len(page) / 1e6:.1f} MB) and {len(files) - 1} PNG files beside it")
    return folder / "index.html"


def compare(run_dirs: list[RunDir]) -> Path:
    """Write ``<first run>/report/compare.html``: the runs' newest checkpoints, curves and settings side by side."""
    columns: list[dict[str, Any]] = []
    runs: list[Facts] = []
    for run_dir in run_dirs:
        trained = load_trained(run_dir, "latest")
        known = facts.read_facts(run_dir, trained)
        runs.append(known)
        columns.append(
            {
                "run": known,
                "tiles": _tiles(known, trained),
                "norms": facts.norms(trained),
                "filters": pictures.data_uri(pictures.filters(trained)),
                "settings": {s["key"]: s["value"] for s in facts.settings(known.config)},
                "commands": facts.commands(known),
            }
        )
        del trained  # half a gigabyte each
    curves = charts.charts(runs)
    keys = [key for key in columns[0]["settings"] if len({str(c["settings"].get(key)) for c in columns}) > 1]
    page = _template("compare.html.j2").render(
        columns=columns,
        made=_now(),
        charts={chart.key: chart.data() for chart in curves},
        differing=keys,
        same_pictures=len({run.manifest["source"] for run in runs}) == 1,
    )
    folder = make_folder(run_dirs[0].report)
    write_bytes(folder / "compare.html", _as_bytes(page))
    if curves:
        write_bytes(folder / "compare.png", charts.curves_png(curves))
    print(f"report: {folder / 'compare.html'} shows {', '.join(str(run_dir.root) for run_dir in run_dirs)}")
    return folder / "compare.html"


@dataclass(frozen=True)
class _Shown:
    """Pictures, for the page and as files."""

    page: dict[str, Any]
    files: dict[str, bytes]


def _shown(known: Facts, dataset: Dataset, trained: Trained, ops: ModuleType) -> _Shown:
    filters, chosen = pictures.filters(trained), _for_activations(known, dataset.val)
    squares = [dataset.val.row(index) for index in chosen]
    maps = pictures.activations(trained, ops, squares)
    shifted = pictures.jitter(squares[0], dataset.directions, known.config.input.jitter or 0.1)
    photos = {
        kind: [_photo(known, dataset.val, i) for i in facts.confident(known, right=kind == "right", most=PHOTOS)]
        for kind in ("right", "wrong")
    }
    images = {
        "filters": pictures.on_white(pictures.enlarged(filters, 6)),
        "jitter": pictures.on_white(shifted),
    }
    for number, (square, layers) in enumerate(zip(squares, maps, strict=True), start=1):
        images[f"activations-{number}"] = pictures.maps_sheet(square, layers)
    for kind, shown in photos.items():
        if shown:
            images[f"confident-{kind}"] = _sheet(dataset.val, shown, right=kind == "right")
    page = {
        "filters": pictures.data_uri(filters),
        "activations": [
            {
                "photo": pictures.photo(square),
                "label": trained.label(int(dataset.val.labels[index])),
                "layers": [_layer(shown) for shown in layers],
            }
            for index, square, layers in zip(chosen, squares, maps, strict=True)
        ],
        "jitter": pictures.data_uri(shifted.quantize(256, method=Image.Quantize.FASTOCTREE)),
        "photos": photos,
    }
    files = {f"{name}.png": pictures.encoded(image) for name, image in images.items()}
    return _Shown(page, files)


def _layer(maps: pictures.Maps) -> dict[str, str]:
    image = maps.image.quantize(64, method=Image.Quantize.FASTOCTREE)
    return {
        "title": maps.title,
        "shape": maps.shape,
        "note": maps.note,
        "image": pictures.data_uri(image, optimize=True),
    }


def _sheet(split: Split, photos: list[dict[str, Any]], *, right: bool) -> Image.Image:
    """Photographs with what the network says of them, and where that is wrong with what they are."""
    # The figure first: it is the name that is cut short where both are too long for a picture's width.
    captions = [
        [
            f"{p['probability']:.1%} {pictures.drawable(p['said'], p['said_class'])}",
            *([] if right else [f"is {pictures.drawable(p['true'], p['true_class'])}"]),
        ]
        for p in photos
    ]
    return pictures.sheet([split.row(p["index"]) for p in photos], captions)


def _photo(known: Facts, split: Split, index: int) -> dict[str, Any]:
    assert known.predictions is not None  # else no index would have been chosen
    top, probability = known.predictions["top"][index], known.predictions["probability"][index]
    names = [known.label(number) for number in top.tolist()]
    true = int(known.predictions["labels"][index])
    return {
        "index": index,
        "image": pictures.photo(split.row(index)),
        "true": known.label(true),
        "true_class": true,
        "said": names[0],
        "said_class": int(top[0]),
        "probability": float(probability[0]),
        "top": [
            {"name": name, "probability": float(p), "right": int(number) == true}
            for name, p, number in zip(names, probability, top, strict=True)
        ],
    }


def _for_activations(known: Facts, split: Split) -> list[int]:
    """Pictures of different classes the network is sure of; without an evaluation the first of different classes."""
    sure = facts.confident(known, right=True, most=ACTIVATIONS)
    firsts = np.sort(np.unique(split.labels, return_index=True)[1]).tolist()
    taken = {int(split.labels[index]) for index in sure}
    return [*sure, *(index for index in firsts if int(split.labels[index]) not in taken)][:ACTIVATIONS]


@dataclass(frozen=True)
class _Part:
    """Some pictures of a split (``data.loader.Pictures``)."""

    split: Split
    rows: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return self.split.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> np.ndarray:
        return self.split.row(int(self.rows[index]))


def _sample(trained: Trained, dataset: Dataset, ops: ModuleType) -> dict[str, Any]:
    """How the checkpoint does on pictures it was trained on, evenly spread over the shards; centre view."""
    count = min(SAMPLE, len(dataset.train))
    rows = np.arange(count) * len(dataset.train) // count
    predict, config = trained.predictor(ops, views=1), trained.config
    result = evaluate(ops, predict, _Part(dataset.train, rows), config, min(config.eval.batch_size, 64), 1)
    return {"images": count, "top1": result.top1, "loss": float(result.loss.mean())}


def _tiles(known: Facts, trained: Trained) -> list[dict[str, str]]:
    """The figures at the top of the page."""
    tiles = []
    if known.evaluation is not None:
        views = known.evaluation["views"]
        note = f"{known.evaluation['images']:,} validation pictures, {_views(views)}"
        names = ("top1", "top5") if len(trained.classes) > TOP else ("top1",)
        for name in names:
            tiles.append({"title": f"Top-{name[-1]} accuracy", "value": f"{known.evaluation[name]:.1%}", "note": note})
        loss = f"{known.evaluation['loss']:.3f}"
        tiles.append({"title": "Validation loss", "value": loss, "note": f"nats, {_views(views)}"})
    done, planned = known.epoch(known.step), known.config.train.epochs
    epochs = f"{done:.4g} of {planned} epochs" if done <= planned else f"{done:.4g} epochs; the recipe has {planned}"
    tiles.append({"title": "Trained", "value": f"{known.step:,}", "note": f"steps, {epochs}"})
    if known.rate is not None:
        device = known.device.upper() if known.device in DEVICES else known.device
        where = f"{device}, {known.precision}" if "precision" in trained.header else device
        note = f"images/s, median while training, {where}"
        tiles.append({"title": "Speed", "value": f"{known.rate:,.0f}", "note": note})
    count = sum(array.size for array in trained.parameters.values())
    tiles.append(
        {"title": "Network", "value": f"{count / 1e6:.1f} M", "note": f"parameters, {len(trained.classes)} classes"}
    )
    return tiles


def _views(count: int) -> str:
    return "centre view" if count == 1 else f"{count} views"


def _color(dataset: Dataset) -> list[dict[str, Any]]:
    """The eigenvectors of the RGB covariance, with the standard deviation along each on the 0..255 scale."""
    rows = []
    for direction in dataset.directions:
        deviation = float(np.linalg.norm(direction))
        unit = direction / deviation if deviation else direction
        rows.append({"deviation": deviation, "vector": unit.tolist()})
    return rows


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = Markup((_HERE / "page.css").read_text("utf-8"))
    environment.globals["script"] = Markup((_HERE / "page.js").read_text("utf-8"))
    environment.filters["percent"] = lambda value, digits=1: f"{value:.{digits}%}"
    environment.filters["short"] = _short
    environment.filters["setting"] = as_text
    return environment.get_template(name)


def _short(value: float | None) -> str:
    """Two digits, small numbers as 3.9e-5; nothing for None."""
    if value is None:
        return ""
    text = f"{value:.2g}" if value >= 0.001 or value == 0 else f"{value:.1e}"
    return text.replace("e-0", "e-")


def _as_bytes(page: str) -> bytes:
    return page.encode(errors="backslashreplace")  # a folder's name may be bytes that are no UTF-8


def _now() -> str:
    return datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
