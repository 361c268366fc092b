"""The examples in the docstrings of the textbook, of the layers and of the network come out as written."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import net.reference
from net import alexnet, layers

FILES = sorted(path.stem for path in Path(net.reference.__file__).parent.glob("[!_]*.py"))


@pytest.mark.parametrize("name", FILES)
def test_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(f"net.reference.{name}"))
    assert failed == 0
    # Arrays are moved, not computed; the second normalisation is LRN's formula over pixels.
    assert tried > 0 or name in ("arrays", "map_norm")


@pytest.mark.parametrize("module", [layers, alexnet])
def test_examples_of_layers(module):
    failed, tried = doctest.testmod(module)
    assert failed == 0
    assert tried > 0
