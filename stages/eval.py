"""Evaluation: every validation picture once, by its centre or by ten views (paper, section 4.1)."""

from __future__ import annotations

import contextlib
import csv
import io
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from data.loader import Batch, Pictures, load
from data.sampling import Crops, steps_per_epoch, view_crops
from net.layers import Array, Parameters, fuse
from net.network import prediction
from pipeline.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from pipeline.config import Config, difference, from_dict
from pipeline.errors import PipelineError
from pipeline.progress import Progress
from pipeline.ranks import ALONE, Ranks
from pipeline.run_dir import RunDir, make_folder, write_bytes, write_json
from pipeline.settings import Request
from stages.setup import (
    MEAN,
    Dataset,
    loader_threads,
    network_layers,
    open_dataset,
    parameter_names,
    preparation,
    require_memory,
    require_size,
    shapes,
)

TOP: Final = 5

Predict = Callable[[dict[str, Array]], Array]  # see net.network.prediction


@dataclass(frozen=True)
class Evaluation:
    """What a network says of each picture of a split.

    ``top`` int32 (N, 5) are the most probable classes, best first, ``probability`` float32 (N, 5) theirs; with fewer
    than five classes there are as many columns as classes. ``loss`` float64 (N,) is -ln of the true class's
    probability, ``labels`` int32 (N,) the true classes.
    """

    labels: np.ndarray
    top: np.ndarray
    probability: np.ndarray
    loss: np.ndarray
    seconds: float

    @property
    def top1(self) -> float:
        return float(np.mean(self.top[:, 0] == self.labels))

    @property
    def top5(self) -> float:
        return float(np.mean(np.any(self.top == self.labels[:, None], axis=1)))


def run(
    run_dir: RunDir,
    ops: ModuleType,
    *,
    checkpoint: str,
    views: int | None,
    request: Request,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Evaluate a checkpoint on the validation split, shared by ``ranks``, and write ``<run>/eval/``.

    The settings are the checkpoint's; of what the ``request`` makes of them, those of ``eval`` and ``loader`` have an
    effect. ``views`` is None for what ``eval.views`` then says.

    Raises
    ------
    PipelineError
        There is no usable checkpoint, it does not fit the shards, or the device has no memory for a batch.
    """
    dataset = open_dataset(run_dir)
    saved = load_checkpoint(find_checkpoint(run_dir.train, checkpoint))
    own = checkpoint_config(saved, dataset)
    asked = request.applied_to(own)
    config = replace(own, eval=asked.eval, loader=asked.loader)
    require_size(config, dataset, run_dir)
    ignored = difference(own, replace(asked, preprocess=own.preprocess, eval=own.eval, loader=own.loader))
    if ignored:
        print(f"note: the network and how it was trained are the checkpoint's own; not used: {'; '.join(ignored)}")
    views = views or config.eval.views
    parameters = {name: ops.asarray(saved.arrays[name]) for name in parameter_names(saved.arrays)}
    mean = saved.arrays.get(MEAN, dataset.mean)
    # Ten views of 256 pictures would take 19 GB of a host's memory; a device's is asked for below.
    pictures = config.eval.batch_size if hasattr(ops, "check_memory") else max(1, config.eval.batch_size // views)
    batch = min(pictures, len(dataset.val))
    layers = network_layers(config, len(dataset.classes))
    require_memory(ops, layers, config, batch, training=False, views=views)
    predict = predictor(config, len(dataset.classes), mean, ops, parameters, views)
    with Progress("evaluate", len(dataset.val), "images") as progress:
        result = evaluate(ops, predict, dataset.val, config, pictures, views, progress, ranks)
    metrics = {
        "images": len(result.labels),
        "loss": float(result.loss.mean()),
        "top1": result.top1,
        "top5": result.top5,
        "views": views,
        "images_per_second": len(result.labels) / result.seconds,
        "checkpoint": saved.path.name,
        "step": saved.header["step"],
        "seal": saved.seal,
    }
    if ranks.leads:
        _write(make_folder(run_dir.eval), dataset, result, metrics)
    print(
        f"evaluated {saved.path.name} on {metrics['images']} pictures, {views} view{'s' if views > 1 else ''}: "
        f"top-1 {metrics['top1']:.2%}, top-5 {metrics['top5']:.2%}, loss {metrics['loss']:.4f}, "
        f"{metrics['images_per_second']:.1f} images/s; written to {run_dir.eval}"
    )
    return metrics


def predictor(
    config: Config, classes: int, mean: np.ndarray, ops: ModuleType, parameters: Parameters, views: int
) -> Predict:
    """The network of a configuration as a function from crops to class probabilities."""
    layers = fuse(network_layers(config, classes), ops)
    return prediction(ops, layers, parameters, preparation(config, mean, ops, jittered=False), views)


def evaluate(
    ops: ModuleType,
    predict: Predict,
    pictures: Pictures,
    config: Config,
    batch_size: int,
    views: int,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Run ``predict`` over all pictures of a split, each once, the last partial batch included.

    Of several ranks each takes every so-many-th batch, whole, so that their number changes no bit; all of them get
    the result.

    Raises
    ------
    PipelineError
        A probability is not finite, or a picture is damaged.
    """
    count = len(pictures)
    numbers = range(ranks.rank, steps_per_epoch(count, batch_size), ranks.size)
    tops, probabilities, losses = [], [], []
    done = 0
    start = time.perf_counter()
    with contextlib.closing(_batches(ops, pictures, config, numbers, batch_size, views)) as batches:
        for number, p in _probabilities(ops, predict, batches):
            if not np.all(np.isfinite(p)):
                raise PipelineError("the network's output is not finite; this checkpoint cannot be used")
            tops.append(most_probable(p))
            probabilities.append(np.take_along_axis(p, tops[-1], axis=1))
            labels = pictures.labels[number * batch_size : number * batch_size + len(p)]
            true = p[np.arange(len(p)), labels].astype(np.float64)
            losses.append(-np.log(np.maximum(true, np.finfo(np.float32).tiny)))
            everywhere = min(len(p) * ranks.size, count - done)  # the other ranks are about as far
            done += everywhere
            if progress is not None:
                progress.advance(everywhere)
    mine = [row for b in numbers for row in range(b * batch_size, min((b + 1) * batch_size, count))]
    ranks.meet(time.perf_counter() - start)
    columns = ranks.largest(tops[0].shape[1] if tops else 0)  # a rank may have had no batch

    def whole(parts: list[np.ndarray], dtype: type, *shape: int) -> np.ndarray:
        rows = np.zeros((count, *shape), dtype)
        if parts:
            rows[mine] = np.concatenate(parts)
        ranks.unite(rows)
        return rows

    top, probability = whole(tops, np.int32, columns), whole(probabilities, np.float32, columns)
    loss = whole(losses, np.float64)
    return Evaluation(pictures.labels, top, probability, loss, time.perf_counter() - start)


def _batches(
    ops: ModuleType, pictures: Pictures, config: Config, numbers: range, batch_size: int, views: int
) -> Generator[Batch, None, None]:
    """The views of ``batch_size`` pictures at a time, for the batches of these numbers."""
    largest = min(batch_size, len(pictures)) * views
    threads = loader_threads(config, ops, largest)

    def plan(number: int) -> Crops:
        first = number * batch_size
        last = min(first + batch_size, len(pictures))
        return view_crops(first, last, views, config.preprocess.size, config.input.crop)

    return load(
        pictures,
        plan,
        numbers,
        crop=config.input.crop,
        largest=largest,
        slots=threads + 1,  # one is being computed on
        threads=threads,
        allocate=ops.host_empty,
    )


def _probabilities(ops: ModuleType, predict: Predict, batches: Iterable[Batch]) -> Iterator[tuple[int, np.ndarray]]:
    """The number of each batch and its class probabilities, read when the batch after it has been started.

    A device of its own computes on while the host looks at the results.
    """
    before: tuple[int, Any] | None = None
    for batch in batches:
        started = batch.number, predict(ops.upload(batch.arrays))
        if before is not None:
            yield before[0], ops.to_host(before[1])
        before = started
    if before is not None:
        yield before[0], ops.to_host(before[1])


def most_probable(p: np.ndarray) -> np.ndarray:
    """The five most probable classes of each row of p (N, classes), best first: int32 (N, 5), or fewer columns.

    Of equally probable classes the one with the smaller number comes first.
    """
    rest, rows = p.copy(), np.arange(len(p))
    top = np.empty((len(p), min(TOP, p.shape[1])), dtype=np.int32)
    for place in range(top.shape[1]):
        top[:, place] = rest.argmax(axis=1)  # the first of equals; five searches are much less than a sort
        rest[rows, top[:, place]] = -1
    return top


def checkpoint_config(saved: Checkpoint, dataset: Dataset) -> Config:
    """The configuration a checkpoint was trained with, after checking that it fits the data and itself."""
    values = saved.header.get("config")
    if not isinstance(values, dict):
        raise PipelineError(f"{saved.path} holds no configuration; choose a checkpoint written by --stage train")
    config = from_dict(values, str(saved.path))
    classes = len(dataset.classes)
    if saved.header.get("classes") != classes:
        raise PipelineError(
            f"{saved.path} was trained on {saved.header.get('classes')} classes, but the data have {classes}; "
            "choose the run directory it belongs to with --run"
        )
    wnids = saved.header.get("wnids")
    if wnids is not None and wnids != [entry["wnid"] for entry in dataset.classes]:
        raise PipelineError(
            f"{saved.path} was trained on other classes than the data have; "
            "choose the run directory it belongs to with --run"
        )
    expected = shapes(network_layers(config, classes), config)
    found = {name: saved.arrays[name].shape for name in parameter_names(saved.arrays)}
    if found != expected:
        raise PipelineError(f"{saved.path} holds other arrays than its configuration says; choose another checkpoint")
    return config


def _write(folder: Path, dataset: Dataset, result: Evaluation, metrics: dict[str, Any]) -> None:
    predictions = io.BytesIO()
    np.savez(predictions, labels=result.labels, top=result.top, probability=result.probability, loss=result.loss)
    write_bytes(folder / "predictions.npz", predictions.getbuffer())
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["class", "wnid", "words", "images", "top1", "top5"])
    hit1 = result.top[:, 0] == result.labels
    hit5 = np.any(result.top == result.labels[:, None], axis=1)
    for number, entry in enumerate(dataset.classes):
        mine = result.labels == number
        images = int(mine.sum())
        rates = [f"{hit[mine].mean():.6f}" if images else "" for hit in (hit1, hit5)]
        writer.writerow([number, entry["wnid"], entry["words"], images, *rates])
    write_bytes(folder / "per_class.csv", table.getvalue().encode())
    write_json(folder / "metrics.json", metrics)
