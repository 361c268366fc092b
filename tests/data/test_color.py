"""Exact moments and the eigenbasis."""

from __future__ import annotations

import numpy as np
import pytest

from data.color import ColorSum, mean_picture, statistics


def pictures(count: int, size: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    tint = random.integers(0, 256, (count, size, size, 1))
    return np.clip(tint + random.integers(-60, 60, (count, size, size, 3)), 0, 255).astype(np.uint8)


def summed(images: np.ndarray) -> ColorSum:
    color = ColorSum(images.shape[1])
    for image in images:
        color.add(image)
    return color


@pytest.mark.parametrize("size", [1, 31, 91, 128])  # below, just above and at a multiple of the chunk
def test_moments_are_the_exact_integer_sums(size):
    images = pictures(3, size)
    color = summed(images)
    u = np.concatenate([np.ones((images.size // 3, 1), dtype=np.int64), images.reshape(-1, 3)], axis=1)
    assert color.moments().dtype == np.int64
    np.testing.assert_array_equal(color.moments(), u.T @ u)
    np.testing.assert_array_equal(color.picture, images.sum(axis=0, dtype=np.uint32))


def test_moments_stay_exact_at_the_largest_values():
    images = np.full((50, 256, 256, 3), 255, dtype=np.uint8)
    pixels = 50 * 65536
    expected = pixels * np.array([[1, 255, 255, 255]] + [[255, 65025, 65025, 65025]] * 3)
    np.testing.assert_array_equal(summed(images).moments(), expected)


def test_statistics_agree_with_numpy():
    images = pictures(6, 40)
    found = statistics(summed(images).moments(), 6)
    pixels = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(found["mean"], pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found["covariance"], np.cov(pixels.T, bias=True), rtol=1e-9)
    assert found["count"] == 6
    values, vectors = np.array(found["eigenvalues"]), np.array(found["eigenvectors"])
    assert values[0] > values[1] > values[2] > 0
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(vectors.T @ np.diag(values) @ vectors, found["covariance"], rtol=1e-9)
    assert all(row[np.abs(row).argmax()] > 0 for row in vectors)


def test_statistics_of_the_whole_do_not_depend_on_how_it_was_divided():
    images = pictures(7, 20)
    parts = sum(summed(part).moments() for part in (images[:2], images[2:3], images[3:]))
    assert statistics(parts, 7) == statistics(summed(images).moments(), 7)


def test_pictures_of_one_colour_have_no_variance():
    found = statistics(summed(np.full((2, 8, 8, 3), 7, dtype=np.uint8)).moments(), 2)
    assert np.array(found["covariance"]).tolist() == np.zeros((3, 3)).tolist()
    assert found["eigenvalues"] == [0.0, 0.0, 0.0]


def test_grey_pictures_have_no_negative_variance():
    """Rounding may leave an eigenvalue of 0 a little below it."""
    for seed in range(5):
        grey = pictures(2, 16, seed)[..., :1].repeat(3, axis=-1)
        assert min(statistics(summed(grey).moments(), 2)["eigenvalues"]) >= 0


def test_the_mean_picture():
    images = pictures(5, 12)
    found = mean_picture(summed(images).picture.astype(np.int64), 5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, images.mean(axis=0), rtol=1e-6)
