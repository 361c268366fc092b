"""Feed every parser of the project files that were changed in a few places; hypothesis chooses where and how.

What comes out is a value or the parser's own error, with one plain sentence. Anything else (another exception, a crash
of a library, an allocation that a damaged number asks for) fails. The short form is test_fuzz.py.
"""

from __future__ import annotations

import gzip
import io
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import scipy.io
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from data import ilsvrc, tar
from data.images import UnreadableError, read_square
from data.matfile import read_structures
from data.shards import Content, Layout, checksum, read_shard, write_shard
from net.weights import caffe, tensors
from net.weights.errors import WeightsError
from pipeline.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from pipeline.config import load_config
from pipeline.config_values import changes, from_dict, to_dict
from pipeline.errors import PipelineError
from pipeline.metrics import read_metrics
from pipeline.run_dir import read_sealed, write_sealed
from tests.data import archives
from tests.net.caffe_files import blob, field

MEMORY: Final = 1 << 30  # bytes the long form may ask for beyond what it starts with
_SIZES: Final = [bytes(8), b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\xff\xff"]


@dataclass(frozen=True)
class Parser:
    """A sound file, what reads it, and the error it may end with."""

    sound: bytes
    read: Callable[[Path], object]
    error: type[Exception]


def parsers(folder: Path) -> dict[str, Parser]:
    """All parsers by name; ``folder`` takes the files they are made from."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.ones(2, np.float32)}
    shapes = {name: array.shape for name, array in weights.items()}
    model = field(
        100,
        field(1, "a")
        + field(2, "InnerProduct")
        + field(7, blob(weights["a.weight"]))
        + field(7, blob(weights["a.bias"])),
    )
    checkpoint = save_checkpoint(folder / "train", 1, {"config": {}}, weights)
    config = folder / "config.json"
    write_sealed(config, to_dict(load_config("seed")))
    archives.write_devkit(folder, archives.IDS, [1, 2, 3])
    devkit = gzip.decompress((folder / ilsvrc.DEVKIT).read_bytes())
    toml = b'seed = 3\n[train]\nlr = [[0, 0.1], [5, 0.01]]\nbatch_size = 64\n[input]\nmean = "image"\nborder = [2, 1]\n'
    metrics = b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25, "x": [1, null]}\n'

    def read_devkit(path: Path) -> object:
        path.write_bytes(gzip.compress(path.read_bytes(), 1))
        return ilsvrc.read_devkit(path)

    def read_tar(path: Path) -> object:
        with tar.opened(path) as (read, stop):
            for member in tar.members(read, 0, stop, str(path)):
                assert 0 <= member.offset <= member.offset + member.size <= stop
        return None

    def read_caffe(path: Path) -> object:
        return caffe.read_arrays(caffe.read_blobs(path), shapes)

    def read_index(path: Path) -> object:
        (path.parent / "latest.json").write_bytes(path.read_bytes())
        return find_checkpoint(path.parent, "latest").relative_to(path.parent)

    def read_config(path: Path) -> object:
        return from_dict(read_sealed(path, "remedy"), str(path))

    found = {
        "tar": Parser(archives.packed({"a" * 120: b"1" * 600, "b": b"2"}), read_tar, PipelineError),
        "devkit": Parser(devkit, read_devkit, PipelineError),
        "devkit, packed": Parser((folder / ilsvrc.DEVKIT).read_bytes(), ilsvrc.read_devkit, PipelineError),
        "MAT-file": Parser(_meta(), lambda p: read_structures(p.read_bytes(), "synsets", ("ID", "WNID")), ValueError),
        "shard": Parser(_shard(folder / "shard.h5"), read_shard, PipelineError),
        "checkpoint": Parser(checkpoint.read_bytes(), load_checkpoint, PipelineError),
        "index": Parser((folder / "train" / "latest.json").read_bytes(), read_index, PipelineError),
        "configuration": Parser(config.read_bytes(), read_config, PipelineError),
        "TOML": Parser(toml, lambda path: changes(path)(load_config("seed")), PipelineError),
        "metrics": Parser(metrics, read_metrics, PipelineError),
        "caffemodel": Parser(model, read_caffe, WeightsError),
        "binaryproto": Parser(blob(np.ones((1, 3, 2, 2)), old=True), caffe.read_mean, WeightsError),
        "safetensors": Parser(
            tensors.to_bytes(weights, {"a": "b"}), lambda path: tensors.read_arrays(path, shapes), WeightsError
        ),
    }
    for form in ("JPEG", "PNG", "GIF", "BMP", "WEBP"):
        found[form] = Parser(
            archives.encoded(archives.picture(1, 24, 18), form),
            lambda path: read_square(path.read_bytes(), 16, "bicubic", Counter()),
            UnreadableError,
        )
    return found


def _meta() -> bytes:
    rows = [(i, f"n{i:02d}", np.arange(i)) for i in range(4)]
    stream = io.BytesIO()
    array = np.array(rows, dtype=[("ID", "O"), ("WNID", "O"), ("other", "O")]).reshape(-1, 1)
    scipy.io.savemat(stream, {"synsets": array})
    return stream.getvalue()


def _shard(path: Path) -> bytes:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    content = Content(
        images=images,
        labels=np.array([0, 1], np.int32),
        devkit_id=np.array([2, 1], np.int32),
        source=np.array([b"a/1", b"b/2"]),
        crc=np.array([checksum(image) for image in images], dtype=np.uint32),
        total=images.sum(axis=0, dtype=np.uint32),
        moments=np.eye(4, dtype=np.int64),
        rejects=[("a/3", "why")],
        warnings={"kind": 2},
    )
    write_shard(path, Layout("train", "plan", 8, "bicubic"), 0, content)
    return path.read_bytes()


@st.composite
def changed(draw: st.DrawFn, sound: bytes) -> bytes:
    """``sound`` with one to four places overwritten, repeated, left out or inserted, and at times cut."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(["overwrite", "overwrite", "flip", "leave out", "insert", "repeat", "cut"]))
        some = draw(st.sampled_from(_SIZES) | st.binary(min_size=1, max_size=8))
        end = place + draw(st.integers(1, 64))
        if how == "overwrite":
            data[place : place + len(some)] = some
        elif how == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "leave out":
            del data[place:end]
        elif how == "insert":
            data[place:place] = some
        elif how == "repeat":
            data[place:place] = data[place:end]
        elif how == "cut":
            del data[place:]
    return bytes(data)


def fuzz(name: str, parser: Parser, folder: Path, examples: int) -> Counter[str]:
    """Feed a parser ``examples`` changed files; returns how many were read and how many refused.

    Raises
    ------
    AssertionError
        Something else came out; hypothesis prints the smallest file it finds with that.
    """
    ends: Counter[str] = Counter()
    path = folder / "step-00000001.ckpt"

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=changed(parser.sound))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            parser.read(path)
        except parser.error as error:
            sentence = str(error)
        else:
            ends["read"] += 1
            return
        assert "\n" not in sentence, sentence
        assert 0 < len(sentence) < 2000, sentence
        ends["refused"] += 1

    path.write_bytes(parser.sound)
    parser.read(path)  # sound, it is read
    check()
    return ends


def fuzz_all(folder: Path, examples: int, *, say: Callable[[str], None] = print) -> None:
    """The long form: ``examples`` changed files a parser, the memory limited."""
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    start = time.monotonic()
    total = 0
    for name, parser in parsers(folder / "sound").items():
        ends = fuzz(name, parser, folder, examples)
        total += ends.total()
        say(f"  {name}: {ends['refused']} refused, {ends['read']} read")
    say(f"{total} files in {time.monotonic() - start:.0f} s; each was read or refused with one plain sentence")
