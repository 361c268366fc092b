"""Colour statistics of the training pictures: exact sums, the covariance of RGB, its eigenbasis, the mean picture.

The moments of a set of pixels are the sum over its pixels of u u^T with u = (1, r, g, b), a 4x4 matrix of integers:
its corner is the number of pixels, its first row the sums, the rest the sums of products. Integers add up to the same
total in any order, so the result does not depend on how many workers made it. The full ILSVRC training set reaches
5.5e15, far below 2^63.

The eigenbasis is that of the paper's colour augmentation (section 4.1).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data import kernels


class ColorSum:
    """Adds up the pictures of one shard.

    Attributes
    ----------
    picture : uint32 (size, size, 3)
        Sum of the pictures; a shard has at most 65,536 of them, so it cannot overflow.
    """

    def __init__(self, size: int) -> None:
        self.picture = np.zeros((size, size, 3), dtype=np.uint32)
        self._images = 0
        self._products = np.zeros(6, dtype=np.int64)  # rr, rg, rb, gg, gb, bb

    def add(self, image: np.ndarray) -> None:
        """Add a picture, uint8 (size, size, 3)."""
        kernels.add_colours(image, self.picture, self._products)
        self._images += 1

    def moments(self) -> np.ndarray:
        """Sum of u u^T over all pixels so far, u = (1, r, g, b): int64 (4, 4)."""
        result = np.zeros((4, 4), dtype=np.int64)
        result[0, 0] = self._images * self.picture.shape[0] * self.picture.shape[1]
        result[0, 1:] = result[1:, 0] = self.picture.sum(axis=(0, 1), dtype=np.int64)
        rr, rg, rb, gg, gb, bb = self._products
        result[1:, 1:] = [[rr, rg, rb], [rg, gg, gb], [rb, gb, bb]]
        return result


def statistics(moments: np.ndarray, images: int) -> dict[str, Any]:
    """Mean, covariance and eigenbasis on the 0..1 scale, from the moments of all training pixels.

    covariance = (n sum(x y) - sum(x) sum(y)) / (n 255)^2, computed in exact integers up to the division; the
    eigenvalues are descending, the eigenvectors rows, each with its largest component positive.
    """
    exact = [[int(value) for value in row] for row in moments]
    pixels, sums = exact[0][0], exact[0][1:]
    mean = [total / (pixels * 255) for total in sums]
    covariance = [
        [(pixels * exact[1 + i][1 + j] - sums[i] * sums[j]) / (pixels * 255) ** 2 for j in range(3)] for i in range(3)
    ]
    values, vectors = np.linalg.eigh(np.array(covariance))
    rows = vectors.T[::-1]
    signs = np.sign(rows[np.arange(3), np.abs(rows).argmax(axis=1)])
    return {
        "scale": "0..1",
        "count": images,
        "pixels": pixels,
        "mean": mean,
        "covariance": covariance,
        "eigenvalues": np.maximum(values[::-1], 0.0).tolist(),
        "eigenvectors": (rows * signs[:, None]).tolist(),
        "moments": exact,
    }


def mean_picture(total: np.ndarray, images: int) -> np.ndarray:
    """The mean of the training pictures, float32 (size, size, 3), 0..255, from their exact sum."""
    return (total / images).astype(np.float32)
