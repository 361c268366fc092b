"""Philox4x32-10 against the published known answers, and the dropout masks drawn from it."""

from __future__ import annotations

import numpy as np
import pytest

from net.reference.dropout import dropout_mask
from net.reference.philox import philox4x32
from tests.net import cases, oracle

# Random123, kat_vectors, lines "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    "00000000 00000000 00000000 00000000  00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1",
]


@pytest.mark.parametrize("line", KNOWN_ANSWERS)
@pytest.mark.parametrize("philox", [philox4x32, oracle.philox4x32])
def test_known_answers(philox, line):
    words = tuple(int(word, 16) for word in line.split())
    assert tuple(int(w) for w in philox(words[:4], words[4:6])) == words[6:]


def test_many_counters_at_once_give_what_each_gives_alone():
    random = cases.random_for("philox")
    counters = random.integers(0, 2**32, (4, 50), dtype=np.uint64)
    key = (0x12345678, 0xFEDCBA98)
    together = np.stack(philox4x32(tuple(counters), key), axis=1)
    assert together.dtype == np.uint32
    for counter, words in zip(counters.T, together, strict=True):
        assert oracle.philox4x32(tuple(int(c) for c in counter), key) == tuple(words.tolist())


@pytest.mark.parametrize("keep", [0.5, 0.1, 0.9])
def test_the_share_kept_is_keep(keep):
    size = 200_000
    share = dropout_mask((size,), keep, (0, 0, 6)).mean()
    # Five standard deviations of a binomial share; the mask is fixed, so this passes always or never.
    assert abs(share - keep) < 5 * (keep * (1 - keep) / size) ** 0.5


def test_keeping_all_and_none():
    assert dropout_mask((1000,), 1.0, (0, 0, 6)).all()
    assert not dropout_mask((1000,), 0.0, (0, 0, 6)).any()


def test_seed_step_and_layer_each_change_the_mask():
    size = 20_000
    base = (1, 2, 6)
    masks = [dropout_mask((size,), 0.5, key) for key in (base, (2, 2, 6), (1, 3, 6), (1, 2, 7))]
    masks += [dropout_mask((size,), 0.5, key) for key in ((1 + 2**32, 2, 6), (1, 2 + 2**32, 6))]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            # Independent masks agree in half of their places, five standard deviations at most away.
            assert abs((one == other).mean() - 0.5) < 5 * 0.5 / size**0.5


def test_the_mask_depends_on_the_place_in_c_order_only():
    flat = dropout_mask((3 * 5 * 7,), 0.5, (4, 5, 6))
    np.testing.assert_array_equal(dropout_mask((3, 5, 7), 0.5, (4, 5, 6)).reshape(-1), flat)
    np.testing.assert_array_equal(dropout_mask((50,), 0.5, (4, 5, 6)), flat[:50])


def test_a_step_in_an_array_is_the_number_in_it():
    step = 2**40 + 3
    in_array = dropout_mask((99,), 0.5, (4, np.array([step], dtype=np.uint64), 6))
    np.testing.assert_array_equal(in_array, dropout_mask((99,), 0.5, (4, step, 6)))
