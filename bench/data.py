"""The data path beside its peers, alternated in one run: ``python -m bench.data PART --source FOLDER``.

preprocess
    One core: decode, resize, crop and write of the source's training pictures. The plain Pillow way (open, convert,
    resize the whole, crop, append to a file), this project's with either decoder, and OpenCV's (whose bicubic filter
    does not smooth when it shrinks: other pixels; where the package cv2 is installed). Then whole shards with colour
    sums, checksums and hashes.
scaling
    The preprocessing stage's rate with one and with two jobs, on the source's pictures eight times over.
loader
    Crops of 2,000 stored pictures in memory into batches of 128: this loader with one and with two threads beside a
    PyTorch DataLoader over the same memory map with two workers.
memory
    What the loader holds while it goes through 1,000 short epochs of the source: memory of the process that is not
    mapped from files, beside the size of the ring.
wait
    The share of training's time spent waiting for data: the training stage on the CPU, the source's pictures, batches
    of 128.
blocks
    A set written for the purpose and dropped from the page cache before each turn: crops in uniform and in block-wise
    order beside ``dd``; and how well the block-wise order mixes. ``--gigabytes 30`` is more than many machines' memory.

The source is a folder as ``--stage preprocess`` takes it; loader and blocks make pictures of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench import command
from data import convert, loader
from data.dataset import open_dataset
from data.images import read_square, resized
from data.plan import make_plan, shard_tasks
from data.readahead import reading_ahead
from data.sampling import (
    BLOCK,
    Augmentation,
    Crops,
    block_groups,
    block_order,
    epoch_order,
    group_ends,
    training_crops,
)
from data.sources import read_source
from pipeline.command_line import at_least_one
from pipeline.config import SEED, Preprocess
from pipeline.metrics import read_metrics
from pipeline.run_dir import RunDir
from stages import preprocess
from stages.batches import TrainingPlan, with_order

try:
    import cv2
except ModuleNotFoundError:
    cv2 = None

PARTS = ("preprocess", "scaling", "loader", "memory", "wait", "blocks")
SIZE, CROP, BATCH = 256, 224, 128
HOW = Augmentation(size=SIZE, crop=CROP, random_crop=True, flip=True, jitter=0.1, directions=np.eye(3))


def alternated(contestants: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Median of the units a second of CPU-bound work, each taking its turn; the first round is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, work in contestants.items():
            start = time.perf_counter()
            count = work()
            if number:
                rates[name].append(count / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def plain(data: bytes) -> np.ndarray:
    """The plain Pillow way."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = resized(*image.size, SIZE)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))


def by_opencv(data: bytes) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    width, height = resized(image.shape[1], image.shape[0], SIZE)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    return np.ascontiguousarray(image[top : top + SIZE, left : left + SIZE])


def preprocessing(source: Path, folder: Path, rounds: int) -> None:
    listed = read_source(source)
    files = [data for _, data in convert.read_files(listed.splits["train"])]
    ways: dict[str, Callable[[bytes], np.ndarray]] = {
        "plain Pillow": plain,
        "ours, pillow": lambda data: read_square(data, SIZE, "bicubic", Counter()),
        "ours, simplejpeg": lambda data: read_square(data, SIZE, "bicubic", Counter(), decoder="simplejpeg"),
    }
    if cv2 is not None:
        cv2.setNumThreads(1)
        ways["OpenCV"] = by_opencv

    def writing(way: Callable[[bytes], np.ndarray]) -> Callable[[], int]:
        def work() -> int:
            with open(folder / "pictures", "wb") as file:
                file.writelines(np.ascontiguousarray(way(data)).data for data in files)
            return len(files)

        return work

    contestants = {name: writing(way) for name, way in ways.items()}
    for decoder in ("pillow", "simplejpeg"):
        config = dataclasses.replace(SEED, preprocess=Preprocess(decoder=decoder))
        tasks = shard_tasks(make_plan(config, listed), folder, os.getpid())[:1]

        def whole(task: convert.ShardTask = tasks[0]) -> int:
            result = convert.make_shard(task)
            assert result.temporary is not None
            result.temporary.unlink()
            return len(result.content.labels)

        contestants[f"whole shard, {decoder}"] = whole
    rates = alternated(contestants, rounds)
    differences: dict[str, list[int]] = {name: [] for name in ways}
    means: dict[str, list[float]] = {name: [] for name in ways}
    for data in files:
        expected = plain(data).astype(np.int16)
        for name, way in ways.items():
            difference = np.abs(way(data) - expected)
            differences[name].append(int(difference.max()))
            means[name].append(float(difference.mean()))
    for name, rate in rates.items():
        told = f"{rate:8.1f} images/s, {rate / rates['plain Pillow']:.2f} times plain"
        if name in ways:
            told += (
                f", difference {statistics.mean(means[name]):.2g} levels in the mean, {max(differences[name])} at most"
            )
        print(f"{name:24} {told}", flush=True)


def scaling(source: Path, folder: Path, rounds: int) -> None:
    """Images a second from the first finished shard to the last, with one and two jobs; starting is left out."""
    big = folder / "source"
    for split in ("train", "val"):
        (big / split).mkdir(parents=True)
    listed = read_source(source)
    for split, copies in (("train", 8), ("val", 1)):
        home = big / split / "all"
        home.mkdir()
        for row, data in convert.read_files(listed.splits[split]):
            for copy in range(copies):
                (home / f"{copy}-{row}.jpg").write_bytes(data)
            if split == "val" and row > 2:
                break
    config = dataclasses.replace(SEED, preprocess=Preprocess(shard_images=96))
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for jobs in (1, 2):
            run = RunDir(folder / f"run-{number}-{jobs}")
            preprocess.run(config, run, source=big, jobs=jobs)
            done = [r for r in read_metrics(run.preprocess / "metrics.jsonl") if "shard" in r]
            first, last = done[1], done[-2]
            rates[jobs].append((last["images_done"] - first["images_done"]) / (last["time"] - first["time"]))
            shutil.rmtree(run.root)
    one, two = statistics.median(rates[1]), statistics.median(rates[2])
    print(f"stage: {one:.1f} images/s with one job, {two:.1f} with two: {two / one:.3f} times", flush=True)


class Stored:
    """Pictures of a memory map, as a split and as a data set of PyTorch's."""

    def __init__(self, path: Path, count: int) -> None:
        # As a plain array: slices of np.memmap take longer, for either contestant.
        self.path, self.images = path, np.asarray(np.memmap(path, np.uint8, "r", shape=(count, SIZE, SIZE, 3)))
        self.labels = np.zeros(count, dtype=np.int32)

    def row(self, index: int) -> np.ndarray:
        return self.images[index]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        top, left = np.random.randint(0, SIZE - CROP + 1, 2).tolist()  # noqa: NPY002  as a data set's author writes it
        crop = self.images[index, top : top + CROP, left : left + CROP]
        if np.random.rand() < 0.5:  # noqa: NPY002
            crop = crop[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(crop)), int(self.labels[index])


def write_pictures(path: Path, count: int) -> None:
    block = np.random.default_rng(0).integers(0, 256, (256, SIZE, SIZE, 3), dtype=np.uint8)
    with open(path, "wb") as file:
        for first in range(0, count, 256):
            file.write(block[: min(256, count - first)].data)
        file.flush()
        os.fsync(file.fileno())


def planned(order: np.ndarray) -> Callable[[int], Crops]:
    return lambda number: training_crops(order, number * BATCH, min((number + 1) * BATCH, len(order)), 0, 0, HOW)


def consumed(stored: Stored, plan: Callable[[int], Crops], batches: int, threads: int) -> int:
    ready = loader.load(stored, plan, range(batches), crop=CROP, largest=BATCH, slots=4, threads=threads)
    return sum(len(batch.arrays["labels"]) for batch in ready)


def loading(folder: Path, rounds: int) -> None:
    write_pictures(folder / "pictures", 2000)
    stored = Stored(folder / "pictures", 2000)
    order = np.concatenate([epoch_order(2000, 0, epoch) for epoch in range(16)])
    torch_loader = torch.utils.data.DataLoader(
        stored, BATCH, shuffle=True, num_workers=2, persistent_workers=True, prefetch_factor=4
    )
    contestants = {
        "ours, 1 thread": lambda: consumed(stored, planned(order), 250, 1),
        "ours, 2 threads": lambda: consumed(stored, planned(order), 250, 2),
        "PyTorch DataLoader, 2 workers": lambda: sum(len(labels) for _, labels in torch_loader),
    }
    rates = alternated(contestants, rounds)
    peer = rates["PyTorch DataLoader, 2 workers"]
    for name, rate in rates.items():
        print(f"{name:32} {rate:9.0f} crops/s, {rate / peer:.2f} times the DataLoader", flush=True)


def preprocessed(source: Path, run: RunDir) -> None:
    """The source's shards, made by the preprocessing stage."""
    with contextlib.redirect_stdout(io.StringIO()):
        preprocess.run(SEED, run, source=source, jobs=os.cpu_count() or 1)


def anonymous() -> int:
    """Bytes of this process's memory that are not mapped from files."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) * 1024


def memory(source: Path, folder: Path, epochs: int = 1000) -> None:
    run = RunDir(folder / "run")
    preprocessed(source, run)
    dataset = open_dataset(run)
    config = with_order(dataclasses.replace(SEED, train=dataclasses.replace(SEED.train, batch_size=BATCH)), dataset)
    plan = TrainingPlan(config, dataset)
    for _ in loader.load(dataset.train, plan, range(2), crop=CROP, largest=BATCH, slots=4, threads=2):
        pass  # compiles, opens and allocates what is needed once
    gc.collect()
    before = anonymous()
    batches = range(epochs * plan.steps_per_epoch)
    start = time.perf_counter()
    for batch in loader.load(dataset.train, plan, batches, crop=CROP, largest=BATCH, slots=4, threads=2):
        epoch, place = divmod(batch.number + 1, plan.steps_per_epoch)
        if not place and epoch in (1, 10, 100, 300, epochs):
            more = (anonymous() - before) / 1e6
            print(f"after epoch {epoch:5}: {more:8.2f} MB more than before the loader", flush=True)
    seconds, ring = time.perf_counter() - start, 4 * BATCH * (CROP * CROP * 3 + 8 + 1 + 12 + 4) / 1e6
    crops = epochs * len(dataset.train)
    print(f"the ring of 4 batches has {ring:.2f} MB; {crops} crops in {seconds:.1f} s", flush=True)


def waiting(source: Path, folder: Path, steps: int) -> None:
    run = RunDir(folder / "run")
    preprocessed(source, run)
    command = [sys.executable, "run_pipeline.py", "--stage", "train", "--run", str(run.root), "--device", "cpu"]
    command += ["--steps", str(steps), "--set", f"train.batch_size={BATCH}", "--set", "train.log_every=1"]
    subprocess.run(command, check=True, capture_output=True)
    lines = [record for record in read_metrics(run.train / "metrics.jsonl") if "data_wait" in record]
    # The first steps compile kernels and fill the ring.
    seconds = [BATCH / record["images_per_second"] for record in lines[5:]]
    waited = sum(s * record["data_wait"] for s, record in zip(seconds, lines[5:], strict=True))
    rate, share = BATCH * len(seconds) / sum(seconds), waited / sum(seconds)
    largest = max(record["data_wait"] for record in lines[5:])
    print(
        f"training on the CPU, {len(seconds)} steps of {BATCH}: {rate:.1f} images/s, {share:.3%} of the time waiting "
        f"for data, at most {largest:.3%} in a step; {lines[0]['data_wait']:.2%} in the first step",
        flush=True,
    )


def blocks(folder: Path, rounds: int, gigabytes: float) -> None:
    path, count = folder / "pictures", int(gigabytes * 1e9) // (SIZE * SIZE * 3)
    write_pictures(path, count)
    picture = SIZE * SIZE * 3

    def forget() -> None:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)

    def dd() -> int:
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=4M"], check=True, capture_output=True)
        return count

    def uniform() -> int:
        some = count // 8 // BATCH  # random reads are slow; an eighth of the set tells
        return consumed(Stored(path, count), planned(epoch_order(count, 0, 0)), some, 1)

    def block_wise() -> int:
        groups = block_groups(count, 0, 0)
        ends = group_ends(groups, count)

        def groups_of(number: int) -> range:
            places = [number * BATCH, min((number + 1) * BATCH, count) - 1]
            first, last = np.searchsorted(ends, places, side="right").tolist()
            return range(first, last + 1)

        def pieces(group: int) -> list[tuple[Path, int, int]]:
            chosen = np.flatnonzero(groups == group).tolist()
            return [(path, b * BLOCK * picture, min(BLOCK, count - b * BLOCK) * picture) for b in chosen]

        steps = -(-count // BATCH)
        with reading_ahead(planned(block_order(count, 0, 0)), groups_of, pieces, 0, steps) as plan:
            return consumed(Stored(path, count), plan, steps, 1)

    rates: dict[str, list[float]] = {"dd": [], "block-wise": [], "uniform": []}
    for _ in range(rounds):
        for name, work in (("dd", dd), ("block-wise", block_wise), ("uniform", uniform)):
            forget()
            start = time.perf_counter()
            done = work()
            rates[name].append(done * picture / (time.perf_counter() - start) / 1e6)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:12} {rate:8.0f} MB/s, {rate / medians['dd']:.2f} of dd", flush=True)
    mixing()


def mixing() -> None:
    """Mean entropy, in bits, of the classes in a batch of 128: of the stored (shuffled) set, and of one stored class
    by class, which is what a block-wise order could do the most harm to."""
    count = 1_281_167
    sorted_labels = np.arange(count) * 1000 // count
    shuffled_labels = np.random.default_rng(0).permutation(sorted_labels)
    for stored, labels in (("shuffled", shuffled_labels), ("class by class", sorted_labels)):
        for name, order in (("uniform", epoch_order(count, 0, 1)), ("block-wise", block_order(count, 0, 1))):
            entropies = []
            for first in range(0, 2000 * BATCH, BATCH):
                share = np.bincount(labels[order[first : first + BATCH]])
                share = share[share > 0] / BATCH
                entropies.append(-float(np.sum(share * np.log2(share))))
            mean = statistics.mean(entropies)
            print(f"stored {stored}, {name}: {mean:.4f} of {math.log2(BATCH):.0f} bits", flush=True)


def main() -> int:
    parser = command("data", __doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--source", type=Path, help="folder with the pictures; loader and blocks make their own")
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the set for blocks")
    parser.add_argument(
        "--steps", type=at_least_one, default=35, help="training steps for wait, the first five not counted"
    )
    options = parser.parse_args()
    if options.part not in ("loader", "blocks") and options.source is None:
        parser.error(f"{options.part} needs --source")
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        parts = {
            "preprocess": lambda: preprocessing(options.source, folder, options.rounds),
            "scaling": lambda: scaling(options.source, folder, options.rounds),
            "loader": lambda: loading(folder, options.rounds),
            "memory": lambda: memory(options.source, folder),
            "wait": lambda: waiting(options.source, folder, options.steps),
            "blocks": lambda: blocks(folder, options.rounds, options.gigabytes),
        }
        parts[options.part]()
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
