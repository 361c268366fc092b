"""A small set of drawn pictures as folders of PNG files, for tests that need a source of their own."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from data.split import Split

SMALL = {"train": (5, 4, 6, 4, 3), "val": (3, 2, 3, 3, 2)}  # pictures a class


def draw(folder: Path, counts: dict[str, tuple[int, ...]] = SMALL, smallest: int = 72, largest: int = 110) -> Path:
    """Noise around a colour for each class; sides between ``smallest`` and ``largest`` pixels."""
    random = np.random.default_rng(2012)
    for split, numbers in counts.items():
        for label, count in enumerate(numbers):
            home = folder / split / f"class{label}"
            home.mkdir(parents=True)
            for number in range(count):
                height, width = random.integers(smallest, largest, 2).tolist()
                pixels = random.integers(0, 120, (height, width, 3)) + np.array([label * 30, 60, 120 - label * 30])
                Image.fromarray(pixels.astype(np.uint8)).save(home / f"{split}{number}.png")
    return folder


def sources(split: Split) -> np.ndarray:
    """The names that a split's pictures had, bytes (N,)."""
    names = []
    for name in split.files:
        with h5py.File(split.folder / name) as file:
            names.append(file["source"][()])
    return np.concatenate(names)
