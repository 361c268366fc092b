"""Everything but decoding at the size of ILSVRC-2012: ``python -m bench.full_size``.

The 1,281,167 training and 50,000 validation members are one tiny JPEG each, so the archives take 2 GB instead of 155;
what is measured depends on the number of members, not on their size. They are listed, shuffled and cut into tasks. Then
a shard is written for each task as the stage writes it (names, labels, checksums, sums and rejects of its pictures),
except that the pictures themselves are a hole in the file, so all take 1.5 GB; the tally adds them up and writes the
manifest, which is read again and its shards opened as training does. Everything is deleted afterwards.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import resource
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.io
from PIL import Image

from bench import command
from data import ilsvrc, shards
from data.convert import ShardResult, ShardTask
from data.dataset import open_dataset
from data.listing import text
from data.manifest import read_manifest
from data.plan import make_plan, shard_tasks
from data.sampling import block_order, epoch_order
from data.shards import Content, shard_bytes
from data.sources import read_source
from data.tally import Tally
from pipeline.command_line import at_least_one
from pipeline.config import SEED
from pipeline.metrics import MetricsLog
from pipeline.run_dir import RunDir, put_in_place

CLASSES, TRAIN, VAL = 1000, 1_281_167, 50_000
HOLE = 4_000_000  # bytes; of a shard's parts only its pictures are larger


def member(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def write_archives(folder: Path, train: int, val: int) -> None:
    """The three official archives with ``train`` and ``val`` members."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 120, 150)).save(stream, "JPEG")
    body = padded(stream.getvalue())
    size = len(stream.getvalue())
    wnids = [f"n{10_000_000 + 7 * number:08d}" for number in range(CLASSES)]
    with open(folder / ilsvrc.TRAIN, "wb") as file:
        for number, wnid in enumerate(wnids):
            count = train // CLASSES + (number < train % CLASSES)
            inner = count * (512 + len(body)) + 1024
            file.write(member(f"{wnid}.tar", inner))
            _pictures(file, [f"{wnid}_{i}.JPEG" for i in range(count)], size, body)
        file.write(bytes(1024))
    with open(folder / ilsvrc.VAL, "wb") as file:
        _pictures(file, [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, val + 1)], size, body)
    _write_devkit(folder / ilsvrc.DEVKIT, wnids, val)


def _pictures(file: BinaryIO, names: list[str], size: int, body: bytes) -> None:
    file.writelines(member(name, size) + body for name in names)
    file.write(bytes(1024))


def _write_devkit(path: Path, wnids: list[str], val: int) -> None:
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = np.array([(i + 1, wnid, f"class {i}", 0) for i, wnid in enumerate(wnids)], dtype=fields)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": rows.reshape(-1, 1)})
    truth = "".join(f"{1 + i % CLASSES}\n" for i in range(val)).encode()
    with gzip.open(path, "wb") as file:
        for name, data in (("meta.mat", meta.getvalue()), ("ILSVRC2012_validation_ground_truth.txt", truth)):
            file.write(member(f"ILSVRC2012_devkit_t12/data/{name}", len(data)) + padded(data))
        file.write(bytes(1024))


def synthetic(task: ShardTask, hole: np.ndarray) -> ShardResult:
    """A shard of the task's pictures, black but not written, one in a thousand rejected; put in place as usual."""
    pictures, size = task.pictures, task.layout.size
    random = np.random.default_rng(task.index)
    rejected = np.flatnonzero(random.random(len(pictures)) < 0.001)
    rows = np.delete(np.arange(len(pictures)), rejected)
    total = random.integers(0, 255 * len(rows), (size, size, 3)).astype(np.uint32)
    moments = np.diag([len(rows) * size * size, *[int(total.sum()) * 100] * 3]).astype(np.int64)
    moments[0, 1:] = moments[1:, 0] = total.sum(axis=(0, 1), dtype=np.int64)
    content = Content(
        images=hole[: len(rows)],
        labels=pictures.label[rows],
        devkit_id=task.devkit_ids[pictures.label[rows]],
        source=pictures.name[rows],
        crc=random.integers(0, 2**32, len(rows), dtype=np.uint32),
        total=total,
        moments=moments,
        rejects=[
            (text(pictures.name[row]), "the decoder says: cannot identify image file") for row in rejected.tolist()
        ],
        warnings={"UserWarning: Corrupt EXIF data": len(rejected)},
    )
    path = task.folder / shards.shard_name(task.layout.split, task.index)
    temporary = path.with_name(f"{path.name}.tmp")
    sha256 = write_with_a_hole(temporary, shards.parts(task.layout, task.index, content))
    length = temporary.stat().st_size
    put_in_place(temporary, path)
    return ShardResult(path.name, task.layout.split, temporary, sha256, length, replace(content, images=None), 1.0, 0)


def write_with_a_hole(path: Path, parts: list[memoryview]) -> str:
    """What the shards' writer does with the parts of a file, but for the pictures, which are skipped."""
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as raw:
        for part in parts:
            if len(part) > HOLE:
                raw.seek(len(part), os.SEEK_CUR)
                raw.truncate()
            else:
                written = raw.write(part)
                assert written == len(part)
                digest.update(part)
    return digest.hexdigest()


Timed = Callable[[str, Callable[[], Any]], Any]  # does the work and notes under a name how long it took


def rehearse(folder: Path, train: int, val: int, timed: Timed) -> tuple[int, int]:
    """Preprocessing's way from archives to opened shards; returns how many shards, and their bytes with pictures."""
    timed("writing the archives", lambda: write_archives(folder, train, val))
    source = timed("listing the archives", lambda: read_source(folder))
    assert {split: len(pictures) for split, pictures in source.splits.items()} == {"train": train, "val": val}
    plan = timed("fingerprint", lambda: make_plan(SEED, source))
    tasks = timed("shuffling and cutting into shards", lambda: shard_tasks(plan, folder / "nothing", None))
    assert sum(len(task.pictures) for task in tasks) == train + val
    run = RunDir(folder / "run")
    run.preprocess.mkdir(parents=True)
    tally = Tally(plan)
    size = SEED.preprocess.size
    hole = np.zeros((SEED.preprocess.shard_images, size, size, 3), np.uint8)  # never touched: no memory

    def made() -> None:
        with MetricsLog(run.preprocess / "metrics.jsonl") as log:
            for task in tasks:
                result = synthetic(replace(task, folder=run.preprocess), hole)
                tally.add(result)
                log.write(tally.record(result, 1.0))
                log.sync()

    timed("the shards without their pictures", made)
    timed("colours, classes, rejects and manifest", lambda: tally.write(run.preprocess))
    splits = timed("reading the manifest", lambda: read_manifest(run))["splits"]
    assert sum(len(splits[split]["shards"]) for split in ("train", "val")) == len(tasks)
    assert sum(splits[split]["images"] + splits[split]["rejects"] for split in ("train", "val")) == train + val
    dataset = timed("opening all shards, as training does", lambda: open_dataset(run))
    assert len(dataset.train) == splits["train"]["images"]
    again = timed("tasks of a run that is taken up", lambda: shard_tasks(plan, run.preprocess, None))
    assert all(task.known for task in again)
    timed("an epoch's order, uniform", lambda: epoch_order(train, 0, 0))
    timed("an epoch's order, block-wise", lambda: block_order(train, 0, 0))
    return len(tasks), sum(shard_bytes(len(task.pictures), size) for task in tasks)


def main() -> int:
    parser = command("full_size", __doc__)
    parser.add_argument("--folder", type=Path, help="where to make all of it (4 GB); default: the temporary folder")
    parser.add_argument("--train", type=at_least_one, default=TRAIN)
    parser.add_argument("--val", type=at_least_one, default=VAL)
    parser.add_argument("--rate", type=float, help="pictures a second and core, for the projected hours")
    options = parser.parse_args()

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{name:40} {seconds:8.2f} s, {memory:.2f} GB at most so far", flush=True)
        return result

    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        count, disk = rehearse(folder, options.train, options.val, timed)
    finally:
        shutil.rmtree(folder)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{count} shards, {disk / 1e9:.1f} GB of disk; peak memory {memory / 1e6:.2f} GB")
    if options.rate:
        hours = (options.train + options.val) / options.rate / 3600
        told = ", ".join(f"{hours / cores:.2f} on {cores} cores" for cores in (2, 16, 64))
        print(f"decoding at {options.rate:g} pictures a second and core: hours {told}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
