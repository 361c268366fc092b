"""The draws of training: permutations, uniform corners and flips, the colour shift, and a stream that never changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import sampling as s

# Rows: eigenvector times standard deviation, about those of ILSVRC.
DIRECTIONS = np.array([[68.2, 70.6, 71.9], [-26.0, 0.3, 26.4], [8.0, -16.0, 8.1]])


def how(size: int = 256, crop: int = 224, **changes: object) -> s.Augmentation:
    values = {"random_crop": True, "flip": True, "jitter": 0.1, "directions": DIRECTIONS, **changes}
    return s.Augmentation(size=size, crop=crop, **values)


def draw(count: int, seed: int = 0, epoch: int = 0, **changes: object) -> s.Crops:
    return s.training_crops(np.arange(count), 0, count, seed, epoch, how(**changes))


@settings(max_examples=60, deadline=None)
@given(pictures=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**31))
def test_each_epoch_is_a_permutation(pictures: int, seed: int, epoch: int) -> None:
    order = s.epoch_order(pictures, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(pictures))


def test_orders_of_epochs_and_seeds_differ() -> None:
    orders = [s.epoch_order(500, seed, epoch) for seed in (0, 1) for epoch in range(4)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two independent permutations agree in one place on average.
            assert np.sum(one == other) < 10


def test_a_picture_lands_anywhere_in_the_epoch() -> None:
    places = np.array([np.argsort(s.epoch_order(50, 3, epoch)) for epoch in range(2000)])
    expected = 2000 / 50
    for picture in range(50):
        counts = np.bincount(places[:, picture], minlength=50)
        assert np.sum((counts - expected) ** 2 / expected) < 105  # chi-square, 49 degrees of freedom, p = 5e-6


def test_corners_are_uniform_over_all_places() -> None:
    corner = draw(66_000).corner
    assert corner.dtype == np.int32
    for axis in range(2):
        counts = np.bincount(corner[:, axis], minlength=33)
        assert len(counts) == 33
        assert np.sum((counts - 2000) ** 2 / 2000) < 80  # 32 degrees of freedom, p = 5e-6
    pairs = np.bincount(corner[:, 0] // 11 * 3 + corner[:, 1] // 11, minlength=9)
    assert np.sum((pairs - 66_000 / 9) ** 2 / (66_000 / 9)) < 40  # rows and columns are independent


def test_flips_are_even_and_independent_of_corner_and_epoch() -> None:
    first, second = draw(40_000, epoch=0), draw(40_000, epoch=1)
    assert first.flip.dtype == np.uint8
    assert set(np.unique(first.flip).tolist()) == {0, 1}
    for share in (
        np.mean(first.flip),
        np.mean(first.flip[first.corner[:, 0] > 16]),
        np.mean(first.flip[first.corner[:, 1] > 16]),
        np.mean(first.flip == second.flip),
    ):
        assert abs(share - 0.5) < 0.02


def test_jitter_has_the_stated_distribution() -> None:
    shift = draw(100_000, jitter=0.25).shift.astype(np.float64)
    draws = shift @ np.linalg.inv(DIRECTIONS) / 0.25  # back to one standard normal number an eigenvector
    assert np.all(np.abs(draws.mean(axis=0)) < 0.02)
    assert np.all(np.abs(np.cov(draws.T) - np.eye(3)) < 0.02)
    assert np.all(np.abs((draws**4).mean(axis=0) - 3) < 0.15)
    assert np.all(np.abs(np.mean(np.abs(draws) < 1, axis=0) - 0.6827) < 0.01)


def test_what_is_switched_off_is_off() -> None:
    crops = draw(50, random_crop=False, flip=False, jitter=0.0)
    assert np.all(crops.corner == 16)
    assert not crops.flip.any()
    assert not crops.shift.any()
    assert crops.shift.dtype == np.float32
    # Switching one off leaves the others as they were.
    assert np.array_equal(draw(50, jitter=0.0).corner, draw(50).corner)
    assert np.array_equal(draw(50, random_crop=False).flip, draw(50).flip)


def test_full_size_crops_have_one_place() -> None:
    assert not draw(100, size=227, crop=227).corner.any()


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 200), max_size=6),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 2**31),
)
def test_draws_do_not_depend_on_how_the_epoch_is_cut_into_batches(cuts: list[int], seed: int, epoch: int) -> None:
    order = s.epoch_order(200, seed, epoch)
    whole = s.training_crops(order, 0, 200, seed, epoch, how())
    bounds = [0, *sorted(cuts), 200]
    parts = [s.training_crops(order, a, b, seed, epoch, how()) for a, b in itertools.pairwise(bounds)]
    for name in ("index", "corner", "flip", "shift"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert joined.tobytes() == getattr(whole, name).tobytes(), name


def test_steps_per_epoch_counts_the_smaller_last_batch() -> None:
    assert [s.steps_per_epoch(n, 8) for n in (1, 7, 8, 9, 16, 17)] == [1, 1, 1, 2, 2, 3]


def test_centre_view() -> None:
    crops = s.view_crops(3, 6, 1, 256, 224)
    assert crops.index.tolist() == [3, 4, 5]
    assert crops.corner.tolist() == [[16, 16]] * 3
    assert not crops.flip.any()
    assert not crops.shift.any()
    assert s.view_crops(0, 1, 1, 256, 227).corner.tolist() == [[14, 14]]


def test_ten_views_are_the_corners_and_the_centre_and_their_mirror_images() -> None:
    crops = s.view_crops(5, 7, 10, 256, 224)
    assert crops.index.tolist() == [5] * 10 + [6] * 10
    places = [[0, 0], [0, 32], [32, 0], [32, 32], [16, 16]]
    assert crops.corner.tolist() == places * 4
    assert crops.flip.tolist() == ([0] * 5 + [1] * 5) * 2
    assert (crops.corner.dtype, crops.flip.dtype, crops.shift.shape) == (np.int32, np.uint8, (20, 3))


def test_the_stream_is_the_one_of_earlier_versions() -> None:
    """A changed value here breaks the resuming of every run that exists."""
    order = s.epoch_order(1000, 7, 3)
    assert order[:8].tolist() == [256, 56, 514, 823, 439, 610, 986, 765]
    crops = s.training_crops(order, 5, 9, 7, 3, how())
    assert crops.index.tolist() == [610, 986, 765, 607]
    assert crops.corner.tolist() == [[1, 17], [6, 2], [29, 28], [24, 9]]
    assert crops.flip.tolist() == [1, 0, 0, 1]
    assert crops.shift == pytest.approx(
        np.array(
            [
                [-1.17913, -4.28002, -5.74925],
                [-9.97201, -4.29183, -2.17885],
                [-3.6886, -1.87842, -2.18463],
                [22.81718, 21.24657, 22.13606],
            ],
            dtype=np.float32,
        ),
        rel=1e-5,
    )
    far = s.training_crops(s.epoch_order(1000, 2**63 - 1, 2**31), 998, 1000, 2**63 - 1, 2**31, how())
    assert (far.index.tolist(), far.corner.tolist(), far.flip.tolist()) == ([98, 445], [[4, 29], [16, 5]], [1, 0])


@settings(max_examples=60, deadline=None)
@given(
    pictures=st.integers(1, 3000),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 2**31),
    block=st.integers(1, 70),
    opened=st.integers(1, 9),
)
def test_the_block_order_is_a_permutation_that_uses_a_few_blocks_at_a_time(pictures, seed, epoch, block, opened):
    order = s.block_order(pictures, seed, epoch, block, opened)
    assert np.array_equal(np.sort(order), np.arange(pictures))
    groups = s.block_groups(pictures, seed, epoch, block, opened)
    assert np.bincount(groups)[:-1].tolist() == [opened] * groups.max()
    assert np.all(np.diff(groups[order // block]) >= 0)  # one group after the other


def test_the_block_order_mixes_within_a_group_and_differs_from_epoch_to_epoch():
    orders = [s.block_order(4000, seed, epoch, 50, 8) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        first = one[:400] // 50  # the first group's pictures, as they come
        assert len(np.unique(first)) == 8
        assert np.all(np.bincount(np.unique(first, return_inverse=True)[1][:80], minlength=8) > 1)
        for other in orders[:i]:
            assert np.sum(one == other) < 30


def test_the_block_order_is_the_one_of_earlier_versions() -> None:
    """A changed value here breaks the resuming of every run in block-wise order that exists."""
    assert s.block_order(1000, 7, 3, 50, 4)[:8].tolist() == [256, 439, 219, 409, 447, 432, 492, 486]
    assert s.block_order(10_000, 7, 3)[:8].tolist() == [5145, 7088, 8356, 5455, 9496, 1650, 1001, 6834]
