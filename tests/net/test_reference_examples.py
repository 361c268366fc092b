"""The examples in the docstrings of the textbook and of the layers come out as written."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import net.reference
from net import layers

FILES = sorted(path.stem for path in Path(net.reference.__file__).parent.glob("[!_]*.py"))


@pytest.mark.parametrize("name", FILES)
def test_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(f"net.reference.{name}"))
    assert failed == 0
    # Arrays are moved, not computed; the second normalisation is LRN's formula over pixels.
    assert tried > 0 or name in ("arrays", "map_norm")


def test_examples_of_layers():
    failed, tried = doctest.testmod(layers)
    assert failed == 0
    assert tried > 0
