"""Archives and checkpoints made to do harm, through the real command line: told, and nothing else is touched."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import h5py
import pytest

from data import ilsvrc
from tests.command_line import QUICK, ROOT, pipeline, settings
from tests.data import archives

# Notes every file that Python opens, with whether it may write; HDF5's own reading of shards is in test_shards.py.
NOTING = """
import os, sys
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if not isinstance(path, int):
            os.write(log, f"{{int(writes)}} {{os.path.abspath(os.fsdecode(path))}}\\n".encode())
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.link", "os.symlink"):
        os.write(log, f"1 {{os.path.abspath(os.fsdecode(arguments[0]))}}\\n".encode())
sys.addaudithook(note)
"""


def png(width: int, height: int) -> bytes:
    """A PNG that claims this size and unpacks to 16 MB of zeros."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(16 << 20), 9)) + chunk(b"IEND", b"")


def wide_jpeg() -> bytes:
    data = bytearray(archives.jpeg(1))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 30, 65535)
    return bytes(data)


def hostile_tar(wnid: str, secret: Path, outside: Path) -> bytes:
    """A class's tar with two sound pictures of odd names and much else."""
    regular, stream = tarfile.REGTYPE, io.BytesIO()
    members = [
        (f"../../../../{outside}/{wnid}_up.JPEG", regular, archives.jpeg(1), ""),
        (f"{outside}/{wnid}_absolute.JPEG", regular, archives.jpeg(2), ""),
        ("soft.JPEG", tarfile.SYMTYPE, b"", str(secret)),
        ("hard.JPEG", tarfile.LNKTYPE, b"", str(secret)),
        ("device.JPEG", tarfile.CHRTYPE, b"", ""),
        ("block.JPEG", tarfile.BLKTYPE, b"", ""),
        ("pipe.JPEG", tarfile.FIFOTYPE, b"", ""),
        (f"again/{wnid}_up.JPEG", regular, archives.jpeg(3), ""),
        ("bomb.JPEG", regular, png(30000, 30000), ""),
        ("largest.JPEG", regular, png(2**31 - 1, 2**31 - 1), ""),
        ("wide.JPEG", regular, wide_jpeg(), ""),
    ]
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind, data, link in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), link
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def test_hostile_archives_reach_nothing_outside_the_run(tmp_path: Path) -> None:
    source, outside, run = tmp_path / "source", tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    secret = outside / "secret.JPEG"
    secret.write_bytes(archives.jpeg(9))
    archives.small_official(source)
    classes = {f"{wnid}.tar": hostile_tar(wnid, secret, outside) for wnid in archives.IDS}
    (source / ilsvrc.TRAIN).write_bytes(archives.packed(classes))
    site, log = tmp_path / "site", tmp_path / "opened"
    site.mkdir()
    (site / "sitecustomize.py").write_text(NOTING.format(log=str(log)))
    quiet = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = ("--stage", "preprocess", "--run", run, "--source", source, "--jobs", 1, *settings(*QUICK))
    pipeline(*arguments, **quiet).done()

    opened = [line.split(" ", 1) for line in log.read_text().splitlines()]
    assert {path for writes, path in opened if int(writes) and not path.startswith(f"{run}/")} <= {
        str(run),
        "/dev/null",
        str(ROOT / "data" / "__pycache__"),  # Numba asks whether it may keep its compiled kernels there
    }
    assert not [path for _, path in opened if path.startswith(str(outside))]
    assert [path.name for path in outside.iterdir()] == ["secret.JPEG"]
    names = []
    for shard in (run / "preprocess").glob("train-*.h5"):
        with h5py.File(shard) as file:
            names += [name.decode() for name in file["source"][()]]
    assert sorted(names) == [f"{wnid}/{wnid}_{kind}.JPEG" for wnid in archives.IDS for kind in ("absolute", "up")]
    lines = (run / "preprocess" / "rejects.jsonl").read_text().splitlines()
    reasons = {r["name"]: r["reason"] for r in map(json.loads, lines) if r["name"].startswith("n01/")}
    assert {name.removeprefix("n01/").removesuffix(".JPEG"): reason for name, reason in reasons.items()} == {
        "soft": "it is a symbolic link",
        "hard": "it is a hard link",
        "device": "it is a device",
        "block": "it is a device",
        "pipe": "it is a pipe",
        "n01_up": "a second picture of this name",
        "bomb": reasons["n01/bomb.JPEG"],
        "largest": reasons["n01/largest.JPEG"],
        "wide": "it has 65535 x 30 pixels; more than 65500 a side or 100000000 are refused",
    }
    for name in ("bomb", "largest"):
        assert "pixels" in reasons[f"n01/{name}.JPEG"]


@pytest.mark.parametrize(
    "field", [b"77777777777\0", b"\x80" + b"\0" * 3 + b"\x7f" * 8, b"\xff" * 12], ids=["8 GB", "huge", "negative"]
)
def test_a_member_that_claims_another_size_is_refused(tmp_path: Path, field: bytes) -> None:
    source = archives.small_official(tmp_path / "source")
    data = bytearray((source / ilsvrc.VAL).read_bytes())
    data[124:136] = field
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (source / ilsvrc.VAL).write_bytes(data)
    pipeline("--stage", "preprocess", "--run", tmp_path / "run", "--source", source).refused(
        r"img_val\.tar is (cut short|damaged).*get it again"
    )
    assert not list((tmp_path / "run").rglob("*.h5"))


def test_a_checkpoint_whose_header_claims_petabytes_is_refused(tmp_path: Path, run: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40, 2**10], "data_offsets": [0, 2**52]}}).encode()
    for name, content in {
        "header.ckpt": struct.pack("<Q", 2**50) + b"{}",
        "array.ckpt": struct.pack("<Q", len(header)) + header,
    }.items():
        (tmp_path / name).write_bytes(content)
        pipeline("--stage", "eval", "--run", run, "--checkpoint", tmp_path / name).refused(
            rf"{name} is damaged or no checkpoint of this program"
        )
    assert not (run / "eval").exists()
