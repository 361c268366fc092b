"""Read a structure array out of a MATLAB file (MAT-file, level 5), as the devkit's ``meta.mat`` is one.

``scipy.io.loadmat`` reads these too, and tests compare the two; but a damaged or hostile file can crash it together
with the whole process. This reader takes what it needs and nothing else: text and single numbers.

Source: MathWorks, "MAT-File Format", chapter 1 (level 5).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Final

_MATRIX: Final = 14
_COMPRESSED: Final = 15
_STRUCTURE_CLASS: Final = 2
_CHARACTER_CLASS: Final = 4
_NUMBER_CLASSES: Final = range(6, 16)
_LARGEST: Final = 64 << 20  # bytes of an unpacked variable

# Data type -> struct format of one number; the text encodings of characters.
_NUMBERS: Final = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
_TEXTS: Final = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}

Value = int | float | str | None


def read_structures(data: bytes, variable: str, fields: tuple[str, ...]) -> list[dict[str, Value]]:
    """The structures in ``variable``, each with the values of ``fields``; None for a value that is an array.

    Raises
    ------
    ValueError
        The data are no MAT-file of level 5, are damaged, or hold no such structures.
    """
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if len(data) < 136 or order is None:
        raise ValueError("no MAT-file of level 5")
    for kind, content in _elements(data[128:], order):
        if kind == _COMPRESSED:
            kind, content = next(_elements(_unpacked(content), order))
        if kind != _MATRIX:
            continue
        parts = _elements(content, order)
        array_class, count, name = _matrix_header(parts, order)
        if name != variable:
            continue
        if array_class != _STRUCTURE_CLASS:
            raise ValueError(f"{variable} is no structure")
        return _structures(parts, count, fields, order)
    raise ValueError(f"it holds no {variable}")


def _unpacked(content: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(content, _LARGEST)
    except zlib.error as error:
        raise ValueError(f"its compressed part is damaged ({error})") from error
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise ValueError("its compressed part is cut short or too large")
    return unpacked


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """The data elements (type, content) that ``data`` consists of; at least one, else it is damaged."""
    place = 0
    while place < len(data) or place == 0:
        if place + 8 > len(data):
            raise ValueError("it is cut short")
        kind, size = struct.unpack_from(order + "II", data, place)
        if kind >> 16:  # a small element: size and type share a word, the content is the next
            kind, size, start = kind & 0xFFFF, kind >> 16, place + 4
            place += 8
        else:
            start = place + 8
            place = start + (size if kind == _COMPRESSED else -(-size // 8) * 8)
        if start + size > len(data):
            raise ValueError("it is cut short")
        yield kind, data[start : start + size]


def _matrix_header(parts: Iterator[tuple[int, bytes]], order: str) -> tuple[int, int, str]:
    """The class, the number of entries and the name of an array."""
    _, flags = _next(parts)
    _, dimensions = _next(parts)
    _, name = _next(parts)
    if len(flags) != 8 or len(dimensions) % 4 or not 8 <= len(dimensions) <= 128:
        raise ValueError("an array's header is damaged")
    count = 1
    for length in struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions):
        count *= max(length, 0)
    return struct.unpack(order + "I", flags[:4])[0] & 0xFF, count, name.decode("latin-1")


def _structures(
    parts: Iterator[tuple[int, bytes]], count: int, fields: tuple[str, ...], order: str
) -> list[dict[str, Value]]:
    _, width = _next(parts)
    _, joined = _next(parts)
    length = struct.unpack(order + "i", width)[0] if len(width) == 4 else 0
    if length < 1 or len(joined) % length:
        raise ValueError("its field names are damaged")
    names = [joined[i : i + length].partition(b"\0")[0].decode("latin-1") for i in range(0, len(joined), length)]
    missing = set(fields) - set(names)
    if missing:
        raise ValueError(f"it has no field {min(missing)}")
    structures = []
    for _ in range(count):  # ends with the data, whatever count the file claims
        values: dict[str, Value] = {}
        for name in names:
            kind, content = _next(parts)
            if name in fields:
                values[name] = _value(content, order) if kind == _MATRIX else None
        structures.append(values)
    return structures


def _value(content: bytes, order: str) -> Value:
    """The text or number in an array; None where it is something else."""
    if not content:
        return None
    parts = _elements(content, order)
    array_class, count, _ = _matrix_header(parts, order)
    if array_class == _CHARACTER_CLASS:
        kind, text = next(parts, (16, b""))
        encoding = _TEXTS.get(kind)
        if encoding is None:
            raise ValueError("a text has an unknown encoding")
        return text.decode(encoding + {"<": "-le", ">": "-be"}[order] if encoding in ("utf-16", "utf-32") else encoding)
    if array_class in _NUMBER_CLASSES and count == 1:
        kind, number = _next(parts)
        form = _NUMBERS.get(kind)
        if form is None or len(number) != struct.calcsize(order + form):
            raise ValueError("a number is damaged")
        return struct.unpack(order + form, number)[0]
    return None


def _next(parts: Iterator[tuple[int, bytes]]) -> tuple[int, bytes]:
    try:
        return next(parts)
    except StopIteration:
        raise ValueError("it is cut short") from None
