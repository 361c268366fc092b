"""A short form of the fuzzing; the long one is ``python -m tests.crash --fuzz 20000``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.fuzz import Parser, fuzz, parsers

NAMES = (
    *("tar", "devkit", "devkit, packed", "MAT-file", "shard", "checkpoint", "index", "configuration", "TOML"),
    *("metrics", "caffemodel", "binaryproto", "safetensors", "JPEG", "PNG", "GIF", "BMP", "WEBP"),
)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parser]:
    return parsers(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("name", NAMES)
def test_changed_files_are_read_or_refused_plainly(tmp_path: Path, known: dict[str, Parser], name: str) -> None:
    ends = fuzz(name, known[name], tmp_path, 40)
    assert ends["refused"] > 0 or name == "metrics"  # metrics lines that make no sense are left out


def test_all_parsers_are_fuzzed(known: dict[str, Parser]) -> None:
    assert tuple(known) == NAMES
