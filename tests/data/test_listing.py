"""The table of pictures and the shuffle."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
import pytest

from data.listing import LARGEST_FILE, Rows, digest, shuffled


def rows(*names: bytes) -> Rows:
    table = Rows("train", containers=[Path("a.tar")])
    for place, name in enumerate(names):
        table.add(name, label=place % 3, size=10 + place, offset=512 * place)
    return table


def test_rows_are_sorted_by_name_whatever_order_they_came_in():
    listing = rows(b"c", b"a", b"b").listing()
    assert listing.name.tolist() == [b"a", b"b", b"c"]
    assert listing.size.tolist() == [11, 12, 10]
    assert listing.offset.tolist() == [512, 1024, 0]
    assert listing.label.tolist() == [1, 2, 0]


def test_of_two_pictures_with_one_name_the_first_is_kept_and_the_second_rejected():
    table = rows(b"a", b"b", b"a")
    listing = table.listing()
    assert listing.offset.tolist() == [0, 512]
    assert [(r.split, r.name, r.reason) for r in table.rejects] == [("train", "a", "a second picture of this name")]


def test_names_and_files_beyond_all_measure_are_rejected():
    table = rows()
    table.add(b"x" * 256, 0, 10)
    table.add(b"big", 0, LARGEST_FILE + 1)
    table.add(b"\xff", 0, 10)
    assert table.listing().name.tolist() == [b"\xff"]
    assert [r.name for r in table.rejects] == ["x" * 255, "big"]


def test_take_keeps_only_the_containers_it_needs():
    table = rows(b"a")
    table.containers.append(Path("b.tar"))
    table.add(b"b", 1, 5, 0)
    part = table.listing().take(np.array([1]))
    assert part.containers == (Path("b.tar"),)
    assert part.container.tolist() == [0]
    assert part.name.tolist() == [b"b"]


def test_the_digest_sees_names_sizes_and_labels_and_not_where_they_lie():
    base = digest(rows(b"a", b"b").listing())
    moved = rows(b"b", b"a")
    moved._size[:], moved._label[:] = array("q", [11, 10]), array("i", [1, 0])
    assert moved.listing().offset.tolist() != rows(b"a", b"b").listing().offset.tolist()
    assert digest(moved.listing()) == base
    assert digest(rows(b"a", b"c").listing()) != base
    assert digest(rows(b"b", b"a").listing()) != base


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_the_shuffle_is_a_permutation(count):
    assert sorted(shuffled(count, 3, "train").tolist()) == list(range(count))


def test_the_shuffle_depends_on_seed_and_split_alone():
    base = shuffled(100, 1, "train").tolist()
    assert shuffled(100, 1, "train").tolist() == base
    assert shuffled(100, 2, "train").tolist() != base
    assert shuffled(100, 1, "val").tolist() != base
    # Written down once: another order would orphan every shard made before.
    assert shuffled(8, 0, "train").tolist() == [5, 4, 1, 2, 7, 3, 6, 0]
