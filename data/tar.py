"""Which members a tar file holds and where their bytes lie, found by hopping from header to header.

Python's ``tarfile`` could list them too, but it keeps every member it has seen (1.3 million here), reads whatever
length a damaged header claims, and stops in silence where an archive is cut off between two members. This reader keeps
nothing, never asks for more than 64 KiB at a time, and refuses an archive that does not end as one should. It never
extracts: what a member is called cannot make anything be written or read elsewhere.

Source: POSIX.1-1988 (ustar) and POSIX.1-2001 (pax), with GNU tar's long names and base-256 sizes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from data.listing import text
from pipeline.errors import PipelineError

Read = Callable[[int, int], bytes]  # (offset, length) -> at most length bytes

_BLOCK: Final = 512
_LARGEST_READ: Final = 65536
_LONGEST_EXTENSION: Final = 65536  # bytes of a long name or a pax record; anything longer is no picture's name
_KINDS: Final = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an archive: ``size`` bytes at ``offset``, counted from the start of the whole file.

    ``kind`` is "file", or says what it is instead ("a symbolic link").
    """

    name: bytes
    offset: int
    size: int
    kind: str


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Read, int]]:
    """Positional reads of the archive, and its size; a plain sentence where it cannot be read."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            # Headers lie a picture apart: the kernel's reading ahead would read the whole archive.
            if hasattr(os, "posix_fadvise"):  # macOS has none
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
            yield lambda offset, length: os.pread(handle, length, offset), os.fstat(handle).st_size
        finally:
            os.close(handle)
    except OSError as error:
        raise PipelineError(f"cannot read {path}: {error.strerror or error}") from error


def members(read: Read, start: int, stop: int, where: str) -> Iterator[Member]:
    """The members of the tar between bytes ``start`` and ``stop``, in their order; folders are left out.

    Parameters
    ----------
    read : callable
        ``read(offset, length)`` gives the file's bytes.
    where : str
        The archive's name for messages.

    Raises
    ------
    PipelineError
        The archive is cut short, damaged, or uses something no ILSVRC archive has (sparse files).
    """
    name: bytes | None = None
    size: int | None = None
    while True:
        header = read(start, _BLOCK) if start + _BLOCK <= stop else b""
        if len(header) < _BLOCK:
            raise PipelineError(f"{where} is cut short: it ends at byte {start} without tar's end mark; get it again")
        if not any(header):
            _check_rest(read, start + _BLOCK, stop, where)
            return
        kind = header[156:157]
        _check_sum(header, where, start)
        if kind in b"SM":
            raise PipelineError(f"{where} holds a sparse or multi-volume member; pack it again without that")
        data = start + _BLOCK
        length = _number(header[124:136], where, start)
        if kind in _KINDS or kind == b"5":  # these have a size field, but no data
            length = 0
        elif size is not None and kind not in b"xgLKV":
            length = size
        if length > stop - data:
            raise PipelineError(
                f"{where} is cut short: it ends inside the member {text(name or _name(header))}; get it again"
            )
        start = data + -(-length // _BLOCK) * _BLOCK
        if kind in b"xL":
            extension = _extension(read, data, length, where)
            if kind == b"L":
                name = extension.partition(b"\0")[0]
            else:
                name, size = _pax(extension, name, size, where, data)
        elif kind not in b"gKV":  # comments for the whole archive, names of what a link points to, volume labels
            member = name or _name(header)
            if kind != b"5" and not member.endswith(b"/"):  # else it is a folder
                what = "file" if kind in b"0\x007" else _KINDS.get(kind, "of an unknown type")
                yield Member(member, data, length, what)
            name = size = None


def _check_rest(read: Read, start: int, stop: int, where: str) -> None:
    """Behind the end mark there is nothing but padding: a header overwritten by zeros must not hide what follows."""
    while start < stop:
        rest = read(start, min(_LARGEST_READ, stop - start))
        if not rest or any(rest):
            raise PipelineError(f"{where} is damaged near byte {start}: members follow its end mark; get it again")
        start += len(rest)


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _check_sum(header: bytes, where: str, offset: int) -> None:
    """The header's bytes add up to the number it holds, its own eight counted as spaces."""
    if sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156], where, offset):
        raise PipelineError(f"{where} is damaged at byte {offset}: no valid tar header is there; get it again")


def _number(field: bytes, where: str, offset: int) -> int:
    """An octal number in ASCII or, where the first bit is set, a big-endian binary one."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not all(0x30 <= digit <= 0x37 for digit in digits):
        raise PipelineError(f"{where} is damaged at byte {offset}: its tar header holds no valid number; get it again")
    return int(digits or b"0", 8)


def _extension(read: Read, offset: int, length: int, where: str) -> bytes:
    if length > _LONGEST_EXTENSION:
        raise PipelineError(f"{where} is damaged at byte {offset}: a name of {length} bytes; get it again")
    return read(offset, length)


def _pax(
    records: bytes, name: bytes | None, size: int | None, where: str, offset: int
) -> tuple[bytes | None, int | None]:
    """The name and size given by pax records, each ``"<length> <key>=<value>\\n"``."""
    while records.strip(b"\0"):
        digits, _, _ = records.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 9 else 0
        record = records[len(digits) + 1 : length] if length <= len(records) else b""
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not equals or not record.endswith(b"\n") or key.startswith(b"GNU.sparse"):
            raise PipelineError(f"{where} is damaged at byte {offset}: a pax record that is none; get it again")
        if key == b"path":
            name = value
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise PipelineError(f"{where} is damaged at byte {offset}: a size that is no number; get it again")
            size = int(value)
        records = records[length:]
    return name, size
