"""Small archives in the official form, for tests."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from data import ilsvrc

Files = dict[str, bytes]

# Three classes whose devkit IDs run against the order of their WNIDs.
IDS = {"n01": 3, "n02": 1, "n03": 2}


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def jpeg(seed: int, width: int = 40, height: int = 30) -> bytes:
    return encoded(picture(seed, width, height), quality=90)


def packed(files: Files, form: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def write_devkit(folder: Path, ids: dict[str, int], truth: list[int]) -> None:
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(identity, wnid, f"words of {wnid}", 0) for identity, wnid in sorted((i, w) for w, i in ids.items())]
    rows.append((1001, "n00", "their ancestor", len(ids)))
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    files = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in truth).encode(),
    }
    (folder / ilsvrc.DEVKIT).write_bytes(gzip.compress(packed(files)))


def write_official(
    folder: Path, train: dict[str, Files], val: Files, truth: list[int], ids: dict[str, int] | None = None
) -> Path:
    """The three archives in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ilsvrc.TRAIN).write_bytes(packed({f"{wnid}.tar": packed(files) for wnid, files in train.items()}))
    (folder / ilsvrc.VAL).write_bytes(packed(val))
    write_devkit(folder, IDS if ids is None else ids, truth)
    return folder


def small_official(folder: Path) -> Path:
    """Three classes with three training pictures each, and four validation pictures: of n03, n01, n02, n01."""
    train = {w: {f"{w}_{i}.JPEG": jpeg(10 * k + i) for i in range(3)} for k, w in enumerate(IDS)}
    val = {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(100 + n) for n in (1, 2, 3, 4)}
    return write_official(folder, train, val, [2, 3, 1, 3])
