"""Evaluation: every validation picture once, by its centre or by ten views (paper, section 4.1)."""

from __future__ import annotations

import contextlib
import csv
import io
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from data.dataset import Dataset, open_dataset
from data.loader import Batch, Pictures, load
from data.sampling import Crops, steps_per_epoch, view_crops
from pipeline.config import Config, load_config
from pipeline.config_values import difference
from pipeline.errors import PipelineError
from pipeline.progress import Progress
from pipeline.ranks import ALONE, Ranks
from pipeline.run_dir import RunDir, make_folder, write_bytes, write_json
from pipeline.settings import Request
from stages.setup import loader_threads, require_memory
from stages.trained import Predict, load_trained

TOP: Final = 5
_TOLD: Final = 3  # settings without effect that are named; a TOML file may have many


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

    def hits(self, first: int) -> np.ndarray:
        """Whether the true class is among each picture's ``first`` most probable ones: bool (N,)."""
        return np.any(self.top[:, :first] == self.labels[:, None], axis=1)

    @property
    def top1(self) -> float:
        return float(np.mean(self.hits(1)))

    @property
    def top5(self) -> float:
        return float(np.mean(self.hits(5)))


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
    trained = load_trained(run_dir, checkpoint, dataset)
    own, asked = trained.config, request.applied_to(trained.config)
    config = replace(own, eval=asked.eval, loader=asked.loader)
    ignored = _without_effect(own, request.recipe, asked)
    if ignored:
        print(f"note: the network and how it was trained are the checkpoint's own; not used: {'; '.join(ignored)}")
    views = views or config.eval.views
    # Ten views of 256 pictures would take 19 GB of a host's memory; a device's is asked for below.
    pictures = config.eval.batch_size if hasattr(ops, "check_memory") else max(1, config.eval.batch_size // views)
    require_memory(ops, trained.layers, config, min(pictures, len(dataset.val)), training=False, views=views)
    predict = trained.predictor(ops, views)
    with Progress("evaluate", len(dataset.val), "images") as progress:
        result = evaluate(ops, predict, dataset.val, config, pictures, views, progress, ranks)
    metrics = {
        "images": len(result.labels),
        "loss": float(result.loss.mean()),
        "top1": result.top1,
        "top5": result.top5,
        "views": views,
        "images_per_second": len(result.labels) / result.seconds,
        "checkpoint": trained.path.name,
        "step": trained.step,
        "seal": trained.seal,
    }
    if ranks.leads:
        write_results(make_folder(run_dir.eval), dataset, result, metrics)
    print(
        f"evaluated {trained.path.name} on {metrics['images']} pictures, {views} view{'s' if views > 1 else ''}: "
        f"{accuracy(result, len(dataset.classes))}, loss {metrics['loss']:.4f}, "
        f"{metrics['images_per_second']:.1f} images/s; written to {run_dir.eval}"
    )
    return metrics


def _without_effect(own: Config, recipe: str | None, asked: Config) -> list[str]:
    """What was asked for and is not the checkpoint's own: a recipe as such, and the first few single settings."""

    def differing(config: Config) -> list[str]:
        if config.train.order == "auto":  # training settled it: what it became there is no other wish than this
            config = replace(config, train=replace(config.train, order=own.train.order))
        return difference(own, replace(config, preprocess=own.preprocess, eval=own.eval, loader=own.loader))

    of_recipe = [] if recipe is None else differing(load_config(recipe))
    single = [entry for entry in differing(asked) if entry not in of_recipe]
    rest = [f"{len(single) - _TOLD} other settings"] if len(single) > _TOLD else []
    return [f"--recipe {recipe}"] * bool(of_recipe) + single[:_TOLD] + rest


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

    Several ranks take turns at the batches, each of which one of them computes whole: so their number changes no bit.
    All of them get the result.

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
        rows: np.ndarray = np.zeros((count, *shape), dtype)
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


def accuracy(result: Evaluation, classes: int) -> str:
    """The fractions that are right, in words; the right one of five classes is always among the first five."""
    return f"top-1 {result.top1:.2%}" + (f", top-5 {result.top5:.2%}" if classes > TOP else "")


def write_results(folder: Path, dataset: Dataset, result: Evaluation, metrics: dict[str, Any]) -> None:
    """Write an evaluation's files: what the network says of each picture, the rates of each class, the metrics."""
    predictions = io.BytesIO()
    np.savez(predictions, labels=result.labels, top=result.top, probability=result.probability, loss=result.loss)
    write_bytes(folder / "predictions.npz", predictions.getbuffer())
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["class", "wnid", "words", "images", "top1", "top5"])
    hits = (result.hits(1), result.hits(5))
    for number, entry in enumerate(dataset.classes):
        mine = result.labels == number
        images = int(mine.sum())
        rates = [f"{hit[mine].mean():.6f}" if images else "" for hit in hits]
        writer.writerow([number, entry["wnid"], entry["words"], images, *rates])
    write_bytes(folder / "per_class.csv", table.getvalue().encode())
    write_json(folder / "metrics.json", metrics)
