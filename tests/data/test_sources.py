"""Which pictures a source holds and what they show: official archives, class tars, class folders, and bad ones."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data import ilsvrc, kaggle
from data.listing import Listing
from data.sources import ClassEntry, read_source, stamp
from pipeline.errors import PipelineError
from tests.data.archives import IDS, jpeg, packed, small_official, write_devkit, write_official


def rows(listing: Listing) -> list[tuple[str, int]]:
    return [(name.decode(), label) for name, label in zip(listing.name.tolist(), listing.label.tolist(), strict=True)]


def content(listing: Listing, row: int) -> bytes:
    container = listing.containers[int(listing.container[row])]
    if listing.offset[row] < 0:
        return (container / listing.name[row].decode().rpartition("/")[2]).read_bytes()
    start = int(listing.offset[row])
    return container.read_bytes()[start : start + int(listing.size[row])]


def unpack_train(source: Path, target: Path, *, as_tars: bool) -> None:
    """The official training archive as ``train/<wnid>.tar`` or ``train/<wnid>/*``."""
    (target / "train").mkdir(parents=True)
    with tarfile.open(source / ilsvrc.TRAIN) as outer:
        for member in outer:
            data = outer.extractfile(member).read()
            if as_tars:
                (target / "train" / member.name).write_bytes(data)
                continue
            folder = target / "train" / member.name.removesuffix(".tar")
            folder.mkdir()
            with tarfile.open(fileobj=io.BytesIO(data)) as inner:
                for picture in inner:
                    (folder / picture.name).write_bytes(inner.extractfile(picture).read())


@pytest.fixture
def official(tmp_path: Path) -> Path:
    return small_official(tmp_path / "official")


def test_official_archives(official: Path):
    source = read_source(official)
    assert source.classes == tuple(ClassEntry(w, f"words of {w}", i) for w, i in IDS.items())
    train, val = source.splits["train"], source.splits["val"]
    assert rows(train) == [(f"{w}/{w}_{i}.JPEG", k) for k, w in enumerate(IDS) for i in range(3)]
    # The ground truth 2, 3, 1, 3 are devkit IDs: classes n03, n01, n02, n01.
    names = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in (1, 2, 3, 4)]
    assert rows(val) == list(zip(names, [2, 0, 1, 0], strict=True))
    assert [content(train, r) for r in range(9)] == [jpeg(10 * k + i) for k in range(3) for i in range(3)]
    assert [content(val, r) for r in range(4)] == [jpeg(100 + n) for n in (1, 2, 3, 4)]
    assert source.rejects == ()


def test_an_archive_is_read_and_a_folder_of_the_same_split_beside_it_is_told(official: Path):
    before = read_source(official)
    unpack_train(official, official, as_tars=True)
    source = read_source(official)
    assert source.fingerprint() == before.fingerprint()
    assert source.notes == (f"the folder train/ is not read, because {ilsvrc.TRAIN} is there",)


def test_a_class_may_have_a_name_that_is_no_utf8(tmp_path: Path):
    """What is written of it later is text, whatever the disk's names are."""
    for split in ("train", "val"):
        folder = tmp_path / split / os.fsdecode(b"caf\xe9")
        folder.mkdir(parents=True)
        (folder / "a.JPEG").write_bytes(b"a")
    source = read_source(tmp_path)
    assert source.classes == (ClassEntry(r"caf\xe9", None, None),)
    assert source.splits["train"].name.tolist() == [b"caf\xe9/a.JPEG"]


def test_validation_pictures_are_paired_by_the_number_in_their_name(tmp_path: Path):
    names = ["ILSVRC2012_val_00000007.JPEG", "ILSVRC2012_val_00000002.JPEG"]  # few of many, and in no order
    write_official(tmp_path, {"n01": {"a": b"1"}}, {name: name.encode() for name in names}, [1, 2, 1, 1, 1, 1, 3, 1])
    assert rows(read_source(tmp_path).splits["val"]) == [(names[1], 2), (names[0], 0)]


def test_validation_pictures_whose_names_tell_no_class_are_rejected(official: Path):
    names = ["ILSVRC2012.JPEG", "._ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"]
    (official / ilsvrc.VAL).write_bytes(packed(dict.fromkeys(names, b"x")))
    source = read_source(official)
    assert rows(source.splits["val"]) == [(names[2], 0)]
    assert [(r.split, r.name, r.reason) for r in source.rejects] == [
        ("val", names[0], "its name has no number that would tell its class")
    ]
    (official / ilsvrc.VAL).write_bytes(packed({"ILSVRC2012_val_00000000.JPEG": b"x"}))
    assert "holds ILSVRC2012_val_00000000.JPEG, but the ground truth in" in refused(official)


def unpack_val(source: Path, folder: Path) -> None:
    """The official validation archive as files in a folder."""
    folder.mkdir(parents=True)
    with tarfile.open(source / ilsvrc.VAL) as archive:
        for member in archive:
            (folder / member.name).write_bytes(archive.extractfile(member).read())


@pytest.fixture
def unpacked(official: Path, tmp_path: Path) -> Path:
    """The archives of ``official`` unpacked, with the devkit: ``train/<wnid>/*`` and ``val/*``."""
    folder = tmp_path / "unpacked"
    unpack_train(official, folder, as_tars=False)
    unpack_val(official, folder / "val")
    (folder / ilsvrc.DEVKIT).write_bytes((official / ilsvrc.DEVKIT).read_bytes())
    return folder


def test_a_flat_val_is_labelled_by_the_devkit(official: Path, unpacked: Path):
    expected, found = read_source(official), read_source(unpacked)
    assert found.fingerprint() == expected.fingerprint()
    assert found.classes == expected.classes
    assert rows(found.splits["val"]) == rows(expected.splits["val"])
    assert [content(found.splits["val"], r) for r in range(4)] == [jpeg(100 + n) for n in (1, 2, 3, 4)]
    assert (found.rejects, found.notes) == ((), ())
    before = stamp(unpacked)
    assert stamp(unpacked) == before
    (unpacked / "val" / "ILSVRC2012_val_00000003.JPEG").unlink()
    assert stamp(unpacked) != before


def test_a_flat_val_beside_the_training_archive(official: Path):
    before = read_source(official)
    unpack_val(official, official / "val")
    (official / ilsvrc.VAL).unlink()
    assert read_source(official).fingerprint() == before.fingerprint()


def test_in_a_flat_val_what_has_no_label_is_rejected_and_what_is_missing_is_told(unpacked: Path):
    val = unpacked / "val"
    for number in (2, 3):
        (val / f"ILSVRC2012_val_{number:08d}.JPEG").unlink()
    (val / "readme.txt").write_bytes(b"text")
    (val / ".DS_Store").write_bytes(b"x")
    (val / "ILSVRC2012_val_00000002.JPEG").symlink_to(val / "nowhere")
    os.mkfifo(val / "ILSVRC2012_val_00000003.JPEG")
    source = read_source(unpacked)
    assert rows(source.splits["val"]) == [(f"ILSVRC2012_val_{n:08d}.JPEG", label) for n, label in ((1, 2), (4, 0))]
    assert sorted((r.split, r.name, r.reason) for r in source.rejects) == [
        ("val", "ILSVRC2012_val_00000002.JPEG", "its file cannot be reached (No such file or directory)"),
        ("val", "ILSVRC2012_val_00000003.JPEG", "it is no regular file"),
        ("val", "readme.txt", "its name has no number that would tell its class"),
    ]
    assert source.notes == (f"{val} holds 2 of the 4 pictures that {ilsvrc.DEVKIT} has labels for",)


def test_a_flat_val_of_other_pictures_is_refused(unpacked: Path):
    val = unpacked / "val"
    (val / "ILSVRC2012_val_00000005.JPEG").write_bytes(b"x")
    assert "holds ILSVRC2012_val_00000005.JPEG, but the ground truth in" in refused(unpacked)
    for path in val.iterdir():
        path.unlink()
    (val / "cat.jpg").write_bytes(b"x")
    assert refused(unpacked).endswith("holds no pictures (cat.jpg: its name has no number that would tell its class)")


def test_a_flat_val_with_a_class_that_is_not_trained_is_refused(unpacked: Path):
    for path in (unpacked / "train" / "n02").iterdir():
        path.unlink()
    (unpacked / "train" / "n02").rmdir()
    assert "val holds pictures of the class n02, of which" in refused(unpacked)


def test_a_flat_val_without_labels_is_told_what_to_put_where(unpacked: Path):
    (unpacked / ilsvrc.DEVKIT).unlink()
    with pytest.raises(PipelineError, match="are sorted into no classes, and nothing says what they show"):
        stamp(unpacked)
    sentence = refused(unpacked)
    wanted = f"put {ilsvrc.DEVKIT} or Kaggle's {kaggle.LABELS} into {unpacked}, or sort the pictures into val/<class>/"
    assert wanted in sentence


LABELS = "".join(
    f"ILSVRC2012_val_{number:08d},{shown}\n"
    for number, shown in ((4, "n01 85 1 499 272 "), (1, "n03 1 2 3 4 n03 5 6 7 8"), (3, "n02"), (2, "n01 0 0 9 9 "))
)


@pytest.fixture
def kaggles(unpacked: Path, tmp_path: Path) -> Path:
    """The same pictures as Kaggle hands them out."""
    top = tmp_path / "kaggle"
    (top / kaggle.FOLDER.parent).mkdir(parents=True)
    (unpacked / ilsvrc.DEVKIT).unlink()
    unpacked.rename(top / kaggle.FOLDER)
    (top / kaggle.LABELS).write_text(f"ImageId,PredictionString\n{LABELS}")
    (top / kaggle.WORDS).write_text("n00 an ancestor\nn01 tench, Tinca tinca\nn02 goldfish\nn03 great white shark\n")
    return top


def test_the_tree_of_kaggle_lists_the_same_pictures(official: Path, kaggles: Path):
    expected, found = read_source(official), read_source(kaggles)
    assert found.fingerprint() == expected.fingerprint()
    assert rows(found.splits["val"]) == rows(expected.splits["val"])
    words = ("tench, Tinca tinca", "goldfish", "great white shark")
    assert found.classes == tuple(ClassEntry(w, said, None) for w, said in zip(IDS, words, strict=True))
    assert (found.rejects, found.notes) == ((), ())
    before = stamp(kaggles)
    assert stamp(kaggles) == before
    (kaggles / kaggle.LABELS).write_text(f"ImageId,PredictionString\n{LABELS}\n")
    assert stamp(kaggles) != before
    assert read_source(kaggles).fingerprint() == expected.fingerprint()


def test_a_rejected_picture_of_kaggles_tree_is_looked_at_where_it_lies(kaggles: Path):
    name = "train/n01/n01_0.JPEG"
    before = stamp(kaggles, [name])
    (kaggles / kaggle.FOLDER / name).write_bytes(b"longer than before, or shorter")
    assert stamp(kaggles) == stamp(kaggles, ["train/n01/nothing"])
    assert stamp(kaggles, [name]) != before


def test_kaggles_list_labels_a_flat_val_beside_folders_or_tars(official: Path, kaggles: Path, tmp_path: Path):
    source = tmp_path / "tars"
    unpack_train(official, source, as_tars=True)
    (source / "val").symlink_to(kaggles / kaggle.FOLDER / "val")
    (source / kaggle.LABELS).write_bytes(
        b"\xef\xbb\xbf" + (kaggles / kaggle.LABELS).read_bytes().replace(b"\n", b"\r\n")
    )
    found = read_source(source)
    assert found.fingerprint() == read_source(official).fingerprint()
    assert {entry.words for entry in found.classes} == {None}


def test_words_come_from_kaggles_list_only_where_the_devkit_has_none(official: Path, tmp_path: Path):
    (official / kaggle.WORDS).write_bytes(b"\xff")
    assert [entry.words for entry in read_source(official).classes] == [f"words of {w}" for w in IDS]
    for split in ("train", "val"):
        (tmp_path / "own" / split / "n01").mkdir(parents=True)
        (tmp_path / "own" / split / "n01" / "a.JPEG").write_bytes(b"a")
    (tmp_path / "own" / kaggle.WORDS).write_text("n01  tench \n\nn02 goldfish")
    assert read_source(tmp_path / "own").classes == (ClassEntry("n01", "tench", None),)
    (tmp_path / "own" / kaggle.WORDS).write_text("n01 tench\nn02\n")
    assert f"line 2 of {tmp_path / 'own' / kaggle.WORDS} is not a WNID, a space" in refused(tmp_path / "own")
    (tmp_path / "own" / kaggle.WORDS).write_bytes(b"n01 \xff")
    assert "is damaged: its byte 5 is no text; get it again" in refused(tmp_path / "own")


def test_the_devkit_goes_before_kaggles_list_and_folders_at_the_top_before_kaggles(official: Path, kaggles: Path):
    (kaggles / ilsvrc.DEVKIT).write_bytes((official / ilsvrc.DEVKIT).read_bytes())
    (kaggles / kaggle.LABELS).write_text("damaged")
    source = read_source(kaggles)
    assert source.notes == (f"{kaggle.LABELS} is not read, because {ilsvrc.DEVKIT} is there",)
    assert source.fingerprint() == read_source(official).fingerprint()
    (kaggles / "train").symlink_to(kaggles / kaggle.FOLDER / "train")
    assert read_source(kaggles).notes == source.notes
    unpack_val(official, kaggles / "val")
    told = f"the folder {kaggle.FOLDER}/val/ is not read, because val/ is there"
    assert read_source(kaggles).notes == (told, *source.notes)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "does not begin with the line ImageId,PredictionString; get it again"),
        (b"id,label\n1,n01\n", "does not begin with the line"),
        (b"ImageId,PredictionString\nILSVRC2012_val_00000001,\n", "is not a picture's name, a comma and"),
        (b"ImageId,PredictionString\nILSVRC2012_val_00000001\n", "is not a picture's name, a comma and"),
        (b"ImageId,PredictionString\n,n01\n", "is not a picture's name, a comma and"),
        (b"ImageId,PredictionString\na,n01,n02\n", "is not a picture's name, a comma and"),
        (b"ImageId,PredictionString\na,n01\na,n01\n", "names a a second time; get it again"),
        (b'ImageId,PredictionString\na,"n01\n', "is damaged (unexpected end of data); get it again"),
        (b"ImageId,PredictionString\na," + b"n" * 200_000, "is damaged (field larger than field limit (131072))"),
        (b"ImageId,PredictionString\na,n01\n\xff", "is damaged: its byte 32 is no text; get it again"),
        (bytes(65 << 20), "has more than 64 MiB and cannot be LOC_val_solution.csv; get it again"),
    ],
)
def test_a_damaged_list_of_kaggle_is_refused(kaggles: Path, content: bytes, said: str):
    (kaggles / kaggle.LABELS).write_bytes(content)
    sentence = refused(kaggles)
    assert str(kaggles / kaggle.LABELS) in sentence
    assert said in sentence


def test_a_list_of_kaggle_that_cannot_be_read_is_refused(kaggles: Path):
    (kaggles / kaggle.LABELS).unlink()
    (kaggles / kaggle.LABELS).mkdir()
    assert refused(kaggles) == f"cannot read {kaggles / kaggle.LABELS}: Is a directory"


def test_pictures_and_lines_that_do_not_fit_together(kaggles: Path):
    path, val = kaggles / kaggle.LABELS, kaggles / kaggle.FOLDER / "val"
    whole = path.read_text()
    (val / "readme.txt").write_bytes(b"text")
    path.write_text(f"{whole}ILSVRC2012_val_00000009,n04 1 2 3 4\n")  # of a class that nothing shows
    source = read_source(kaggles)
    assert len(source.splits["val"]) == 4
    assert [(r.split, r.name, r.reason) for r in source.rejects] == [
        ("val", "readme.txt", f"{kaggle.LABELS} has no line for it")
    ]
    assert source.notes == (f"{val} holds 4 of the 5 pictures that {kaggle.LABELS} has labels for",)
    path.write_text(whole.replace("00000001,n03", "00000001,n04"))
    assert f"says that ILSVRC2012_val_00000001.JPEG in {val} shows the class n04, of which" in refused(kaggles)
    path.write_text("".join(whole.splitlines(keepends=True)[:3]))
    assert "has no line for it; it is cut short or another one: get it again" in refused(kaggles)


def test_a_folder_inside_kaggles_tree_is_told_where_it_begins(kaggles: Path):
    inside = kaggles / kaggle.FOLDER
    sentence = refused(inside)
    assert f"{kaggle.LABELS} into {inside}, name {kaggles} with --source, which has that file, or sort" in sentence
    for folder in inside.parents[:2]:
        assert refused(folder).endswith(f"; name {kaggles} with --source, where Kaggle's tree begins")
    (inside / kaggle.LABELS).write_bytes((kaggles / kaggle.LABELS).read_bytes())
    assert read_source(inside).fingerprint() == read_source(kaggles).fingerprint()
    (inside / "train").rename(inside / "elsewhere")
    assert f"has a folder {kaggle.FOLDER}/val/ but no {kaggle.FOLDER}/train/; add it" in refused(kaggles)


@pytest.mark.parametrize("as_tars", [True, False])
def test_class_tars_and_folders_list_the_same_pictures(official: Path, tmp_path: Path, as_tars):
    other = tmp_path / "other"
    unpack_train(official, other, as_tars=as_tars)
    for name in (ilsvrc.VAL, ilsvrc.DEVKIT):
        (other / name).write_bytes((official / name).read_bytes())
    expected, found = read_source(official), read_source(other)
    assert found.fingerprint() == expected.fingerprint()
    assert found.classes == expected.classes
    for row in range(9):
        assert content(found.splits["train"], row) == content(expected.splits["train"], row)


def test_splits_in_different_forms_and_no_devkit(tmp_path: Path):
    for split, count in (("train", 2), ("val", 1)):
        for wnid in ("n01", "n02"):
            if (split, wnid) == ("val", "n02"):
                (tmp_path / split / f"{wnid}.tar").write_bytes(packed({f"{i}.JPEG": b"x" for i in range(count)}))
                continue
            (tmp_path / split / wnid).mkdir(parents=True)
            for i in range(count):
                (tmp_path / split / wnid / f"{i}.JPEG").write_bytes(b"x")
    source = read_source(tmp_path)
    assert source.classes == (ClassEntry("n01", None, None), ClassEntry("n02", None, None))
    assert rows(source.splits["train"]) == [("n01/0.JPEG", 0), ("n01/1.JPEG", 0), ("n02/0.JPEG", 1), ("n02/1.JPEG", 1)]
    assert rows(source.splits["val"]) == [("n01/0.JPEG", 0), ("n02/0.JPEG", 1)]


def test_the_fingerprint_sees_a_changed_picture_and_the_stamp_a_changed_file(official: Path):
    source, before = read_source(official).fingerprint(), stamp(official)
    assert stamp(official) == before
    write_devkit(official, IDS, [2, 3, 1, 1])
    assert stamp(official) != before
    assert read_source(official).fingerprint() != source


def test_what_is_no_picture_file_is_rejected_and_hidden_files_are_left_out(official: Path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind, data in [
            ("../../n01_0.JPEG", tarfile.REGTYPE, b"abc"),
            ("/n01_1.JPEG", tarfile.REGTYPE, b"abcd"),
            ("again/n01_1.JPEG", tarfile.REGTYPE, b"other"),
            ("n01_2.JPEG", tarfile.SYMTYPE, b""),
            ("n01_3.JPEG", tarfile.CHRTYPE, b""),
            ("._n01_0.JPEG", tarfile.REGTYPE, b"abc"),
            ("n" * 260 + ".JPEG", tarfile.REGTYPE, b"abc"),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), "/etc/passwd"
            archive.addfile(member, io.BytesIO(data))
    outer = {"n01.tar": stream.getvalue(), "n02.tar": packed({"a": b"1"}), "README": b"text", "._n02.tar": b"x"}
    (official / ilsvrc.TRAIN).write_bytes(packed(outer))
    source = read_source(official)
    assert rows(source.splits["train"]) == [("n01/n01_0.JPEG", 0), ("n01/n01_1.JPEG", 0), ("n02/a", 1)]
    assert content(source.splits["train"], 1) == b"abcd"
    assert [(r.split, r.name[:20], r.reason) for r in source.rejects] == [
        ("train", "n01/n01_2.JPEG", "it is a symbolic link"),
        ("train", "n01/n01_3.JPEG", "it is a device"),
        ("train", "n01/nnnnnnnnnnnnnnnn", "its name is longer than 255 bytes"),
        ("train", "README", "file in place of a class's tar"),
        ("train", "n01/n01_1.JPEG", "a second picture of this name"),
    ]


def test_in_folders_only_regular_files_are_read(tmp_path: Path):
    for split in ("train", "val"):
        (tmp_path / split / "n01" / "inner").mkdir(parents=True)
        (tmp_path / split / "n01" / "a.JPEG").write_bytes(b"a")
    folder = tmp_path / "train" / "n01"
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "elsewhere.JPEG").symlink_to(folder / "a.JPEG")
    (folder / "broken.JPEG").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.JPEG")
    source = read_source(tmp_path)
    assert [name for name, _ in rows(source.splits["train"])] == ["n01/a.JPEG", "n01/elsewhere.JPEG"]
    assert {(r.name, r.reason) for r in source.rejects} == {
        ("n01/broken.JPEG", "its file cannot be reached (No such file or directory)"),
        ("n01/pipe.JPEG", "it is no regular file"),
    }


def test_what_lies_where_no_pictures_are_looked_for_is_told(tmp_path: Path):
    for split in ("train", "val"):
        (tmp_path / split / "n01").mkdir(parents=True)
        (tmp_path / split / "n01" / "a.JPEG").write_bytes(b"a")
        (tmp_path / split / ".DS_Store").write_bytes(b"x")
        (tmp_path / split / "n01" / ".cache").mkdir()
    before = read_source(tmp_path)
    assert before.notes == ()
    train = tmp_path / "train"
    (train / "x.jpg").write_bytes(b"x")
    assert read_source(tmp_path).notes == ("train/ holds 1 loose file, such as x.jpg: it is not read",)
    for name in ("readme.txt", os.fsdecode(b"p\xff")):
        (train / name).write_bytes(b"x")
    os.mkfifo(train / "queue.tar")
    for name in ("sub", "other"):
        (train / "n01" / name).mkdir()
        (train / "n01" / name / "x.jpg").write_bytes(b"x")
    (tmp_path / "val" / "n01" / "sub").mkdir()
    source = read_source(tmp_path)
    assert source.notes == (
        r"train/ holds 4 loose files, such as p\xff, and 2 folders inside class folders, such as n01/other: "
        "they are not read",
        "val/ holds 1 folder inside a class folder, such as n01/sub: it is not read",
    )
    assert source.fingerprint() == before.fingerprint()
    assert source.rejects == ()
    (train / "n01" / "a.JPEG").rename(train / "n01" / "sub" / "a.JPEG")
    assert "holds no pictures (train/ holds 4 loose files" in refused(tmp_path)
    (train / "n02").mkdir()
    (train / "n02" / "b.JPEG").write_bytes(b"b")
    assert "the class n01 in" in refused(tmp_path)
    assert "remove it (train/ holds 4 loose files" in refused(tmp_path)


def refused(root: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        read_source(root)
    message = str(caught.value)
    assert str(root) in message
    assert "\n" not in message
    return message


def test_an_empty_folder_is_refused(tmp_path: Path):
    assert "holds neither the ILSVRC-2012 archives" in refused(tmp_path)
    assert "is not a folder" in refused(tmp_path / "mistyped")


@pytest.mark.parametrize("present", [ilsvrc.TRAIN, ilsvrc.VAL, ilsvrc.DEVKIT])
def test_one_archive_alone_names_the_two_that_are_missing(official: Path, present):
    for name in {ilsvrc.TRAIN, ilsvrc.VAL, ilsvrc.DEVKIT} - {present}:
        (official / name).unlink()
    message = refused(official)
    have, _, missing = message.partition(" but not ")
    assert present in have
    for name in (ilsvrc.TRAIN, ilsvrc.VAL, ilsvrc.DEVKIT):
        assert (name in missing) == (name != present)


def test_a_missing_devkit_or_split_is_named(official: Path, tmp_path: Path):
    (official / ilsvrc.DEVKIT).unlink()
    assert f"but not {ilsvrc.DEVKIT}; put it beside them" in refused(official)
    (tmp_path / "x" / "train" / "n01").mkdir(parents=True)
    assert "has a folder train/ but no val/" in refused(tmp_path / "x")


def test_a_devkit_of_other_classes_is_refused(official: Path):
    write_devkit(official, {"n01": 1, "n02": 2}, [1, 2, 1, 2])
    message = refused(official)
    assert "holds the class n03, which" in message
    assert ilsvrc.DEVKIT in message


def test_a_ground_truth_that_is_too_short_is_refused(official: Path):
    write_devkit(official, IDS, [1, 2, 3])
    assert "holds ILSVRC2012_val_00000004.JPEG, but the ground truth in" in refused(official)


def test_a_ground_truth_of_unknown_ids_is_refused(official: Path):
    write_devkit(official, IDS, [1, 2, 9, 3])
    assert "line 3 of its ground truth is no class ID" in refused(official)


def test_class_ids_that_tell_no_classes_apart_are_refused(official: Path):
    write_devkit(official, {"n01": 1, "n02": 2, "n03": 2}, [1, 2, 2, 1])
    assert "the class IDs in its meta.mat are not distinct" in refused(official)
    write_devkit(official, {"n01": 1, "n02": 2, "n03": -1}, [1, 2, 2, 1])  # would be the last of an array
    assert "holds the class n03, which" in refused(official)


@pytest.mark.parametrize("name", [ilsvrc.TRAIN, ilsvrc.VAL, ilsvrc.DEVKIT])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_an_archive_cut_short_is_named(official: Path, name, share):
    data = (official / name).read_bytes()
    end = len(data) if name == ilsvrc.DEVKIT else len(data.rstrip(b"\0"))
    (official / name).write_bytes(data[: int(end * share)])
    message = refused(official)
    assert name in message
    assert "cut short" in message or "damaged" in message


def test_a_devkit_that_is_something_else_is_refused(official: Path):
    no_block = gzip.compress(b"text")[:10] + b"\xff" * 30
    for data in (
        b"",
        b"text",
        no_block,
        gzip.compress(b"text"),
        gzip.compress(packed({"data/meta.mat": b"MATLAB 5.0" * 30})),
    ):
        (official / ilsvrc.DEVKIT).write_bytes(data)
        assert ilsvrc.DEVKIT in refused(official)


def test_a_damaged_meta_mat_is_refused_or_harmless(official: Path):
    files = {}
    with tarfile.open(official / ilsvrc.DEVKIT) as archive:
        for member in archive:
            files[member.name] = archive.extractfile(member).read()
    name = "ILSVRC2012_devkit_t12/data/meta.mat"
    sound, random, told = files[name], np.random.default_rng(0), 0
    for _ in range(150):
        data = bytearray(sound)
        data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
        (official / ilsvrc.DEVKIT).write_bytes(gzip.compress(packed({**files, name: bytes(data)}), 1))
        try:
            read_source(official)
        except PipelineError as error:
            told += ilsvrc.DEVKIT in str(error)
    assert told > 20


def test_a_devkit_that_unpacks_to_no_end_is_refused(official: Path):
    (official / ilsvrc.DEVKIT).write_bytes(gzip.compress(bytes(80 << 20), 1))
    assert "it unpacks to more than 64 MiB" in refused(official)


def test_classes_that_do_not_fit_are_refused(tmp_path: Path):
    for path in ("train/n01", "val/n01", "val/n02", "train/n03"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "a.JPEG").write_bytes(b"x")
    assert "val/n02 is a class that the training pictures do not have" in refused(tmp_path)
    (tmp_path / "val" / "n02" / "a.JPEG").unlink()
    (tmp_path / "val" / "n02").rmdir()
    (tmp_path / "train" / "n03" / "a.JPEG").unlink()
    assert "the class n03 in" in refused(tmp_path)
    (tmp_path / "train" / "n03.tar").write_bytes(packed({"a": b"1"}))
    assert "holds the class n03 twice, as a folder and as a tar" in refused(tmp_path)


def test_official_validation_of_classes_without_training_pictures_is_refused(official: Path, tmp_path: Path):
    other = tmp_path / "other"
    unpack_train(official, other, as_tars=True)
    (other / "train" / "n02.tar").unlink()
    for name in (ilsvrc.VAL, ilsvrc.DEVKIT):
        (other / name).write_bytes((official / name).read_bytes())
    assert "holds pictures of the class n02, of which" in refused(other)


def test_empty_folders_are_refused(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert "train holds no classes" in refused(tmp_path)
    (tmp_path / "train" / "n01").mkdir()
    assert "train holds no pictures" in refused(tmp_path)


def test_the_real_devkit_agrees_with_the_published_labels(ilsvrc_mini: Path):
    devkit = ilsvrc.read_devkit(ilsvrc_mini / ilsvrc.DEVKIT)
    reference = ilsvrc_mini.parent / "reference"
    wnids = [line.split()[0] for line in (reference / "synset_words.txt").read_text().splitlines()]
    words = [line.partition(" ")[2] for line in (reference / "synset_words.txt").read_text().splitlines()]
    assert sorted(devkit.ids) == wnids
    assert [devkit.words[wnid] for wnid in wnids] == words
    of_id = {identity: wnids.index(wnid) for wnid, identity in devkit.ids.items()}
    published = [int(line.split()[1]) for line in (reference / "val.txt").read_text().splitlines()]
    assert [of_id[identity] for identity in devkit.ground_truth.tolist()] == published


def test_real_class_tars_are_listed_whole(shared_data: Path):
    source = read_source(shared_data / "imagenette")
    assert [len(source.splits[split]) for split in ("train", "val")] == [6000, 1500]
    assert len(source.classes) == 10
    for listing in source.splits.values():
        wnids = [source.classes[label].wnid for label in listing.label.tolist()]
        assert [name.partition(b"/")[0].decode() for name in listing.name.tolist()] == wnids
    assert source.rejects == ()
