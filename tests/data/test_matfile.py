"""data/matfile.py against scipy.io, and against damaged files."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st

from data import ilsvrc
from data.matfile import read_structures

FIELDS = ("ILSVRC2012_ID", "WNID", "words", "num_children")
ROWS = [(1, "n02", "ä word, another", 0), (2.5, "n01", "", 0), (70000, "n03", "x" * 300, np.arange(3))]


def saved(rows: list, *, compressed: bool = False) -> bytes:
    stream = io.BytesIO()
    array = np.array(rows, dtype=[(name, "O") for name in FIELDS]).reshape(-1, 1)
    other = {"first": np.arange(5), "text": "abc"}
    scipy.io.savemat(stream, {**other, "synsets": array, "last": 1.0}, do_compression=compressed)
    return stream.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
def test_reads_what_scipy_wrote(compressed):
    found = read_structures(saved(ROWS, compressed=compressed), "synsets", FIELDS)
    assert [tuple(entry[name] for name in FIELDS) for entry in found] == [
        (1, "n02", "ä word, another", 0),
        (2.5, "n01", "", 0),
        (70000, "n03", "x" * 300, None),
    ]


def test_reads_the_real_meta_mat_as_scipy_does(ilsvrc_mini: Path):
    with tarfile.open(ilsvrc_mini / ilsvrc.DEVKIT) as archive:
        data = archive.extractfile("ILSVRC2012_devkit_t12/data/meta.mat").read()
    expected = scipy.io.loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
    found = read_structures(data, "synsets", FIELDS)
    assert len(found) == len(expected) == 1860
    for entry, reference in zip(found, expected, strict=True):
        assert tuple(entry[name] for name in FIELDS) == tuple(reference[name] for name in FIELDS)


@pytest.mark.parametrize(
    ("data", "variable", "why"),
    [
        (b"", "synsets", "no MAT-file"),
        (b"MATLAB 5.0".ljust(126) + b"IM", "synsets", "no MAT-file"),
        (saved(ROWS)[:-40], "last", "cut short"),
        (saved(ROWS), "other", "it holds no other"),
        (saved(ROWS), "first", "first is no structure"),
    ],
)
def test_what_is_missing_is_told(data, variable, why):
    with pytest.raises(ValueError, match=why):
        read_structures(data, variable, FIELDS)


def test_a_missing_field_is_told():
    with pytest.raises(ValueError, match="it has no field gloss"):
        read_structures(saved(ROWS), "synsets", ("WNID", "gloss"))


def test_a_claimed_count_makes_no_work():
    data = saved(ROWS)
    place = data.index(b"\x05\0\0\0\x08\0\0\0\x03\0\0\0\x01\0\0\0")  # the dimensions 3 x 1
    huge = b"\xff\xff\xff\x7f"
    with pytest.raises(ValueError, match=r"cut short|damaged"):
        read_structures(data[: place + 8] + huge + huge + data[place + 16 :], "synsets", FIELDS)


def test_a_compressed_part_that_unpacks_to_no_end_is_refused():
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"synsets": np.zeros(9 << 20)}, do_compression=True)
    with pytest.raises(ValueError, match="cut short or too large"):
        read_structures(stream.getvalue(), "synsets", FIELDS)


@pytest.mark.parametrize("compressed", [False, True])
@given(
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=5), cut=st.integers(0, 1 << 16)
)
@settings(max_examples=300, deadline=None)
def test_damaged_files_give_structures_or_a_value_error(compressed, changes, cut):
    data = bytearray(saved(ROWS[:2], compressed=compressed))
    for position, value in changes:
        data[position % len(data)] = value
    data = data[: cut % (2 * len(data))]
    try:
        found = read_structures(bytes(data), "synsets", FIELDS)
    except ValueError:
        return
    assert all(set(entry) <= set(FIELDS) for entry in found)
