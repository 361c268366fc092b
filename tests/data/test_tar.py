"""data/tar.py against Python's tarfile, and against archives that are damaged or hostile."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tar import Member, members, opened
from pipeline.errors import PipelineError
from tests.data.archives import packed

FILES = {
    "short.JPEG": b"abc",
    "empty": b"",
    "folder/inner.JPEG": b"x" * 1000,
    "l" * 120 + ".JPEG": b"y" * 512,
    "d/" * 100 + "deep.JPEG": b"z" * 513,
    "e" * 300 + ".JPEG": b"w",
    "näme.JPEG": b"utf-8",
}


def listed(data: bytes, start: int = 0, stop: int | None = None) -> list[Member]:
    return list(members(lambda o, n: data[o : o + n], start, len(data) if stop is None else stop, "the.tar"))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_lists_what_tarfile_lists(form):
    data = packed(FILES, form)
    found = listed(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(m.name.encode(), m.offset_data, m.size) for m in archive]
    assert [(m.name, m.offset, m.size) for m in found] == expected
    assert {m.name.decode(): data[m.offset : m.offset + m.size] for m in found} == FILES
    assert all(m.kind == "file" for m in found)


def test_lists_a_ustar_archive_with_prefixes():
    name = "p" * 90 + "/" + "q" * 90
    assert [m.name.decode() for m in listed(packed({name: b"1"}, tarfile.USTAR_FORMAT))] == [name]


def test_lists_a_tar_within_a_tar():
    inner = packed({"a": b"12", "b": b"345"})
    outer = packed({"before": b"?" * 700, "inner.tar": inner, "after": b"!"})
    place = listed(outer)[1]
    found = listed(outer, place.offset, place.offset + place.size)
    assert [outer[m.offset : m.offset + m.size] for m in found] == [b"12", b"345"]


def test_says_what_is_no_file_and_goes_on_behind_it():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("../../etc/passwd")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("/absolute")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    found = listed(stream.getvalue())
    kinds = [m.kind for m in found]
    assert kinds == ["a symbolic link", "a hard link", "a device", "a pipe", "file"]
    assert (found[-1].name, found[-1].size) == (b"/absolute", 3)


def test_refuses_an_archive_cut_anywhere():
    data = packed({"a": b"1" * 600, "b": b"2" * 600})
    end = len(data.rstrip(b"\0"))
    end += -end % 512  # where the end mark begins
    for cut in [*range(0, end, 128), *range(end, end + 512, 128), end + 511]:
        with pytest.raises(PipelineError, match=r"the\.tar is cut short"):
            listed(data[:cut])
    assert len(listed(data[: end + 512])) == 2


def test_refuses_every_changed_byte_of_a_header():
    data = packed({"name.JPEG": b"1234"})
    for position in range(512):
        for bit in (0x01, 0x80):
            changed = bytearray(data)
            changed[position] ^= bit
            with pytest.raises(PipelineError, match=r"the\.tar (is|holds)"):
                listed(bytes(changed))


def test_zeros_over_a_header_do_not_hide_the_members_behind_it():
    data = packed({f"{i}.JPEG": bytes([i]) * 700 for i in range(1, 4)})
    hidden = data[:1536] + bytes(512) + data[2048:]
    with pytest.raises(PipelineError, match=r"damaged near byte \d+: members follow its end mark"):
        listed(hidden)
    assert len(listed(data + bytes(200_000))) == 3


def with_size(field: bytes, kind: bytes = b"0") -> bytes:
    """One header that claims a size, with a valid checksum."""
    header = bytearray(packed({"name": b""})[:512])
    header[124:136], header[156:157] = field, kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(2048)


@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"K", b"g", b"5"])
@pytest.mark.parametrize(
    "field", [b"77777777777\0", b"\x80" + b"\0" * 3 + b"\xff" * 8, b"\xff" * 12, b"-0000000001\0", b"12 34567890\0"]
)
def test_a_size_that_cannot_be_is_refused_before_anything_is_read_by_it(field, kind):
    asked = []

    def read(offset: int, length: int) -> bytes:
        asked.append(length)
        return data[offset : offset + length]

    data = with_size(field, kind)
    if kind == b"5" and field[:1] in b"7\x80":  # a folder has no data whatever its size field says
        assert list(members(read, 0, len(data), "the.tar")) == []
    else:
        with pytest.raises(PipelineError, match=r"the\.tar is (cut short|damaged)"):
            list(members(read, 0, len(data), "the.tar"))
    assert max(asked) <= 65536


def test_a_huge_name_is_refused_without_reading_it():
    size = 1 << 20
    data = with_size(b"%011o\0" % size, b"L")[:512] + bytes(size + 1024)
    with pytest.raises(PipelineError, match="a name of 1048576 bytes"):
        listed(data)


@pytest.mark.parametrize("record", [b"99 path=x\n", b"x path=x\n", b"9 path=x", b"0 path=x\n", b"13 size=-100\n"])
def test_a_damaged_pax_record_is_refused(record):
    data = with_size(b"%011o\0" % len(record), b"x")[:512] + record.ljust(512, b"\0") + packed({"a": b"1"})
    with pytest.raises(PipelineError, match=r"the\.tar is damaged"):
        listed(data)


def test_a_pax_size_replaces_the_headers():
    record = b"10 size=3\n"
    data = with_size(b"%011o\0" % len(record), b"x")[:512] + record.ljust(512, b"\0")
    data += with_size(b"00000000777\0")[:512] + b"abc".ljust(512, b"\0")
    data += with_size(b"00000000001\0")[:512] + b"z".ljust(512, b"\0") + bytes(1024)
    found = [(m.size, data[m.offset : m.offset + m.size]) for m in listed(data)]
    assert found == [(3, b"abc"), (1, b"z")], "it holds for one member"


def test_sparse_members_are_refused():
    for kind in (b"S", b"M"):
        with pytest.raises(PipelineError, match="sparse"):
            listed(with_size(b"00000000000\0", kind))
    record = b"22 GNU.sparse.major=1\n"
    with pytest.raises(PipelineError, match="a pax record that is none"):
        listed(with_size(b"%011o\0" % len(record), b"x")[:512] + record.ljust(512, b"\0") + bytes(1024))


def test_an_archive_that_shrinks_while_it_is_read_is_refused():
    data = packed({"a": b"1"})
    with pytest.raises(PipelineError, match="is damaged near byte"):
        listed(data, stop=len(data) + 512)


def harmless(data: bytes) -> Iterator[Member]:
    try:
        yield from listed(data)
    except PipelineError:
        return


@given(st.binary(max_size=3000))
@settings(max_examples=100, deadline=None)
def test_any_bytes_give_members_inside_the_file_or_a_plain_sentence(data):
    for member in harmless(data):
        assert 0 <= member.offset <= member.offset + member.size <= len(data)


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=4), st.integers(0, 1 << 20))
@settings(max_examples=200, deadline=None)
def test_a_changed_archive_gives_members_inside_the_file_or_a_plain_sentence(changes, cut):
    data = bytearray(packed(FILES, tarfile.PAX_FORMAT))
    for position, value in changes:
        data[position % len(data)] = value
    data = data[: max(1, cut % (2 * len(data)))]
    for member in harmless(bytes(data)):
        assert 0 <= member.offset <= member.offset + member.size <= len(data)


def test_a_missing_archive_is_told_plainly(tmp_path: Path):
    with (
        pytest.raises(PipelineError, match=r"cannot read .*missing\.tar: No such file"),
        opened(tmp_path / "missing.tar"),
    ):
        pass


def test_a_system_without_advice_lists_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on macOS."""
    monkeypatch.delattr(os, "posix_fadvise")
    (tmp_path / "a.tar").write_bytes(packed(FILES, tarfile.GNU_FORMAT))
    with opened(tmp_path / "a.tar") as (read, stop):
        assert {member.name.decode() for member in members(read, 0, stop, "a.tar")} == set(FILES)
