"""The examples in the docstrings of the textbook, of the network and of its fast backends come out as written."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import net.reference

FILES = sorted(path.stem for path in Path(net.reference.__file__).parent.glob("[!_]*.py"))
ELSEWHERE = ["net.layers", "net.alexnet", "net.cpu.cook_toom"]


@pytest.mark.parametrize("name", FILES)
def test_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(f"net.reference.{name}"))
    assert failed == 0
    assert tried > 0 or name == "arrays"  # which are moved, not computed


@pytest.mark.parametrize("name", ELSEWHERE)
def test_examples_elsewhere(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0
    assert tried > 0


def test_no_example_is_left_out():
    root = Path(net.reference.__file__).parents[2]
    with_examples = {
        ".".join(path.relative_to(root).with_suffix("").parts)
        for folder in ("net", "data", "pipeline", "stages", "bench")
        for path in (root / folder).rglob("*.py")
        if re.search(r"^\s*>>> ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    assert with_examples <= {*(f"net.reference.{name}" for name in FILES), *ELSEWHERE}
