"""The shard's writer and reader against each other, and the reader against files that are damaged or hostile."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from data.color import ColorSum
from data.manifest import read_manifest
from data.shards import (
    LABEL_ORDER,
    RULE,
    SCHEMA,
    Content,
    Layout,
    checksum,
    index_hash,
    read_layout,
    read_shard,
    shard_name,
    write_shard,
)
from data.split import open_split
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir, hash_file, read_sealed, write_sealed
from tests.conftest import ROOT
from tests.pictures import sources

SIZE = 8


def layout(split: str = "train", plan: str = "the plan") -> Layout:
    return Layout(split, plan, SIZE, "bicubic")


def content(count: int, seed: int = 0, size: int = SIZE) -> Content:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    color = ColorSum(size)
    for image in images:
        color.add(image)
    return Content(
        images=images,
        labels=random.integers(0, 4, count).astype(np.int32),
        devkit_id=random.integers(1, 5, count).astype(np.int32),
        source=np.array([f"n0/{seed}_{i}.JPEG".encode() for i in range(count)], dtype="S20"),
        crc=np.array([checksum(image) for image in images], dtype=np.uint32),
        total=color.picture,
        moments=color.moments(),
        rejects=[("n0/ä.JPEG", "no picture")],
        warnings={"UserWarning: odd": 2},
    )


def make_run(root: Path, counts: dict[str, list[int]]) -> RunDir:
    """A run whose manifest describes shards of these sizes."""
    run = RunDir(root)
    run.preprocess.mkdir(parents=True)
    splits = {}
    for split, sizes in counts.items():
        entries = []
        for index, count in enumerate(sizes):
            path = run.preprocess / shard_name(split, index)
            written = content(count, seed=index)
            write_shard(path, layout(split), index, written)
            size, digest = path.stat().st_size, hash_file(path)
            index_digest = index_hash(written.labels, written.crc)
            entry = {"file": path.name, "images": count, "bytes": size, "sha256": digest, "index": index_digest}
            entries.append(entry)
        splits[split] = {"images": sum(sizes), "rejects": 0, "shards": entries}
    manifest = {
        "schema": SCHEMA,
        "plan": "the plan",
        "source": "",
        "settings": "",
        "size": SIZE,
        "filter": "bicubic",
        "resize": RULE,
        "label_order": LABEL_ORDER,
        "classes": 4,
        "splits": splits,
        "files": {},
    }
    write_sealed(run.preprocess / "manifest.json", manifest)
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run", {"train": [3, 0, 2], "val": [4]})


def test_what_was_written_is_read_back(tmp_path: Path):
    path, written = tmp_path / "s.h5", content(30)  # enough to be aligned to a page
    assert write_shard(path, layout(), 7, written) == hash_file(path)
    assert read_layout(path) == layout()
    found = read_shard(path, layout())
    for name in ("labels", "devkit_id", "source", "crc", "total", "moments"):
        np.testing.assert_array_equal(getattr(found, name), getattr(written, name))
    assert (found.rejects, found.warnings) == (written.rejects, written.warnings)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["images"], written.images)
        assert file["images"].chunks is None
        assert file["images"].compression is None
        assert file["images"].id.get_offset() % 4096 == 0
        assert (file.attrs["schema"], file.attrs["index"], file.attrs["split"]) == (SCHEMA, 7, "train")


@pytest.mark.parametrize("count", [0, 1, 5, 20, 21, 22, 23, 200])  # HDF5 aligns larger ones only
def test_the_hash_is_that_of_the_file(tmp_path: Path, count: int):
    path = tmp_path / "s.h5"
    assert write_shard(path, layout(), 7, content(count)) == hash_file(path)
    np.testing.assert_array_equal(read_shard(path).labels, content(count).labels)


def test_the_bytes_depend_on_the_content_alone(tmp_path: Path):
    write_shard(tmp_path / "a.h5", layout(), 0, content(5))
    (tmp_path / "b.h5").write_bytes(b"old and longer " * 1000)
    write_shard(tmp_path / "b.h5", layout(), 0, content(5))
    write_shard(tmp_path / "c.h5", layout(), 0, content(5, seed=1))
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert (tmp_path / "a.h5").read_bytes() != (tmp_path / "c.h5").read_bytes()
    with h5py.File(tmp_path / "a.h5") as file:  # two files of one second have the same times
        assert {h5py.h5g.get_objinfo(file.id, name.encode()).mtime for name in file} == {0}


def test_a_split_serves_all_shards_as_one(run: RunDir):
    split = open_split(run.preprocess, read_manifest(run), "train")
    expected = [content(n, seed=i) for i, n in enumerate([3, 0, 2])]
    assert len(split) == 5
    assert split.starts.tolist() == [0, 3, 3, 5]
    assert split.starts.dtype == np.int64
    assert split.labels.dtype == np.int32
    np.testing.assert_array_equal(split.labels, np.concatenate([e.labels for e in expected]))
    np.testing.assert_array_equal(sources(split), np.concatenate([e.source for e in expected]))
    for row, image in enumerate(np.concatenate([e.images for e in expected])):
        np.testing.assert_array_equal(split.row(row), image)
    assert isinstance(split.images[0].base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        split.row(0)[0, 0, 0] = 1


def test_more_shards_than_files_may_be_open(tmp_path: Path):
    make_run(tmp_path / "run", {"train": [1] * 60, "val": [1]})
    code = f"""
import resource
from pathlib import Path
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
from data.manifest import read_manifest
from data.split import open_split
from pipeline.run_dir import RunDir
run = RunDir(Path({str(tmp_path / "run")!r}))
print(len(open_split(run.preprocess, read_manifest(run), "train")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "60\n", done.stderr


def test_without_manifest_the_command_is_named(tmp_path: Path):
    with pytest.raises(
        PipelineError, match=r"manifest\.json does not exist: .*not been finished; run .*--stage preprocess --run "
    ):
        read_manifest(RunDir(tmp_path))


def test_a_missing_or_cut_shard_is_named(run: RunDir):
    path = run.preprocess / "train-00002.h5"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PipelineError, match=r"train-00002\.h5 is not the file that was written; run "):
        read_manifest(run)
    path.unlink()
    with pytest.raises(PipelineError, match=r"train-00002\.h5 is missing \(No such file or directory\); run "):
        read_manifest(run)


def change(value: dict, keys: list, to: object) -> None:
    for key in keys[:-1]:
        value = value[key]
    if to is None:
        del value[keys[-1]]
    else:
        value[keys[-1]] = to


@pytest.mark.parametrize(
    ("keys", "to"),
    [
        (["schema"], 99),
        (["schema"], None),
        (["classes"], "4"),
        (["size"], True),
        (["resize"], "warp"),
        (["label_order"], "devkit ID"),
        (["splits", "val"], None),
        (["splits", "train", "images"], 6),
        (["splits", "train", "shards"], []),
        (["splits", "train", "shards", 0, "file"], "../../etc/passwd"),
        (["splits", "train", "shards", 0, "file"], "val-00000.h5"),
        (["splits", "train", "shards", 0, "images"], 3.0),
        (["splits", "train", "shards", 0, "sha256"], None),
        (["splits", "train", "shards", 0, "index"], None),
        (["files"], {"../../elsewhere": "0"}),
        (["files"], []),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(run: RunDir, keys, to):
    path = run.preprocess / "manifest.json"
    manifest = read_sealed(path, "")
    change(manifest, keys, to)
    write_sealed(path, manifest)
    with pytest.raises(PipelineError, match=r"manifest\.json is damaged or from another version"):
        read_manifest(run)


def hostile(path: Path, how: str, elsewhere: Path) -> None:
    """Replace ``images`` of a sound shard (3 pictures) in a way no reader should follow."""
    shape = (3, SIZE, SIZE, 3)
    outside = h5py.File(elsewhere, "w")
    outside["images"] = np.zeros(shape, dtype=np.uint8)
    outside.close()
    with h5py.File(path, "r+") as file:
        del file["images"]
        if how == "missing":
            pass
        elif how == "external link":
            file["images"] = h5py.ExternalLink(str(elsewhere), "/images")
        elif how == "soft link":
            file["really"] = np.zeros(shape, dtype=np.uint8)
            file["images"] = h5py.SoftLink("/really")
        elif how == "group":
            file.create_group("images")
        elif how == "external storage":
            file.create_dataset("images", shape, "u1", external=[(str(elsewhere), 0, 3 * SIZE * SIZE * 3)])
        elif how == "virtual":
            virtual = h5py.VirtualLayout(shape, "u1")
            virtual[...] = h5py.VirtualSource(str(elsewhere), "images", shape)
            file.create_virtual_dataset("images", virtual)
        elif how == "chunked":
            file.create_dataset("images", shape, "u1", chunks=(1, SIZE, SIZE, 3))
        elif how == "compressed":
            file.create_dataset("images", shape, "u1", compression="gzip")
        elif how == "floats":
            file["images"] = np.zeros(shape, dtype=np.float32)
        elif how == "objects":
            file["images"] = np.array(["x"] * 3, dtype=h5py.string_dtype())
        elif how == "another shape":
            file["images"] = np.zeros((3, SIZE, SIZE, 4), dtype=np.uint8)
        elif how == "fewer pictures":
            file["images"] = np.zeros((2, SIZE, SIZE, 3), dtype=np.uint8)
        elif how == "not allocated":
            file.create_dataset("images", shape, "u1")
        elif how == "beyond the end":
            file["images"] = np.zeros(shape, dtype=np.uint8)
    if how == "beyond the end":
        with h5py.File(path, "r") as file:
            offset = file["images"].id.get_offset()
        data = path.read_bytes()
        assert data.count(offset.to_bytes(8, "little")) == 1
        path.write_bytes(data.replace(offset.to_bytes(8, "little"), (len(data) - 100).to_bytes(8, "little")))


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "external link",
        "soft link",
        "group",
        "external storage",
        "virtual",
        "chunked",
        "compressed",
        "floats",
        "objects",
        "another shape",
        "fewer pictures",
        "not allocated",
        "beyond the end",
    ],
)
def test_a_shard_that_could_not_be_mapped_safely_is_refused(run: RunDir, tmp_path: Path, how):
    path = run.preprocess / "train-00000.h5"
    manifest = read_manifest(run)
    hostile(path, how, tmp_path / "elsewhere.h5")
    with pytest.raises(PipelineError, match=r"train-00000\.h5 is not usable \(.*\); remove it and run ") as caught:
        open_split(run.preprocess, manifest, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["labels", "source"])
def test_a_link_in_place_of_the_small_arrays_is_refused(run: RunDir, tmp_path: Path, name):
    path = run.preprocess / "train-00000.h5"
    with h5py.File(path, "r+") as file, h5py.File(tmp_path / "elsewhere.h5", "w") as outside:
        outside[name] = file[name][()]
        del file[name]
        file[name] = h5py.ExternalLink(str(tmp_path / "elsewhere.h5"), name)
    with pytest.raises(PipelineError, match="link to elsewhere"):
        read_shard(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schema", 2),
        ("size", 16),
        ("plan", "x"),
        ("split", "val"),
        ("filter", "box"),
        ("resize", "other"),
        ("label_order", "other"),
    ],
)
def test_a_shard_of_another_kind_is_refused(run: RunDir, name, value):
    manifest = read_manifest(run)
    with h5py.File(run.preprocess / "train-00000.h5", "r+") as file:
        file.attrs[name] = value
    with pytest.raises(PipelineError, match=r"train-00000\.h5 is not usable"):
        open_split(run.preprocess, manifest, "train")


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_of_no_class_are_refused(run: RunDir, label):
    manifest = read_manifest(run)
    with h5py.File(run.preprocess / "train-00000.h5", "r+") as file:
        file["labels"][1] = label
        entry = manifest["splits"]["train"]["shards"][0]
        entry["index"] = index_hash(file["labels"][()], file["crc"][()])
    with pytest.raises(PipelineError, match="labels of classes that do not exist"):
        open_split(run.preprocess, manifest, "train")


def test_a_picture_that_the_disk_cannot_read_is_told(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """A bad sector under a memory map kills the process; so a picture's first use reads it."""
    split = open_split(run.preprocess, read_manifest(run), "train")

    def fail(handle: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(PipelineError, match=r"train-00002\.h5 cannot be read at picture 4 \(Input/output error\): "):
        split.row(4)
    monkeypatch.undo()
    assert split.row(4).shape == (SIZE, SIZE, 3)
    monkeypatch.setattr(os, "pread", fail)
    assert split.row(4).shape == (SIZE, SIZE, 3), "it is read once"


def test_a_changed_pixel_is_told_when_the_picture_is_first_used(run: RunDir):
    manifest = read_manifest(run)
    path = run.preprocess / "train-00002.h5"
    with h5py.File(path, "r+") as file:
        file["images"][1, 3, 4, 2] ^= 1
    split = open_split(run.preprocess, manifest, "train")
    assert split.row(3).shape == (SIZE, SIZE, 3)
    for _ in range(2):
        with pytest.raises(PipelineError, match=r"train-00002\.h5 is damaged in picture 4"):
            split.row(4)


@pytest.mark.parametrize("name", ["labels", "crc"])
def test_a_changed_label_or_checksum_is_told_at_opening(run: RunDir, name):
    manifest = read_manifest(run)
    with h5py.File(run.preprocess / "train-00000.h5", "r+") as file:
        file[name][1] = (file[name][1] + 1) % 4
    with pytest.raises(PipelineError, match="its labels or checksums are not those that were written"):
        open_split(run.preprocess, manifest, "train")


def test_random_damage_is_harmless_or_told(run: RunDir):
    manifest = read_manifest(run)
    path = run.preprocess / "train-00000.h5"
    sound, random = path.read_bytes(), np.random.default_rng(0)
    told = 0
    for _ in range(60):
        data = bytearray(sound)
        # The first few thousand bytes hold HDF5's own structures.
        for position in random.integers(0, min(len(data), 6000), size=3).tolist():
            data[position] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        try:
            split = open_split(run.preprocess, manifest, "train")
            assert split.row(0).shape == (SIZE, SIZE, 3)
            read_shard(path)
        except PipelineError:
            told += 1
    assert told > 8


def test_a_write_that_fails_is_told_and_leaves_what_was_there(tmp_path: Path):
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
from pathlib import Path
from tests.data.test_shards import content, layout
from data.shards import write_shard
from pipeline.errors import PipelineError
for count in (200, 1):
    try:
        write_shard(Path({str(tmp_path / "a.h5")!r}), layout(), 0, content(count, size=8 if count > 1 else 64))
    except PipelineError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == f"cannot write {tmp_path / 'a.h5'}: File too large\n" * 2, done.stderr
    assert done.stderr == ""
