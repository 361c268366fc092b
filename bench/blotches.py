"""Random pictures and draws, for a bench that needs batches and no pictures of anything."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.config import Config


def batches(config: Config, classes: int, batch: int, steps: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Random crops with everything a loader draws; pictures are blotches, since noise alone looks like nothing."""
    random = np.random.default_rng(seed)
    crop, room = config.input.crop, config.preprocess.size - config.input.crop + 1
    for _ in range(steps):
        blotches = (
            random.normal(0, 60, (batch, -(-crop // 16), -(-crop // 16), 3)).repeat(16, axis=1).repeat(16, axis=2)
        )
        pictures = 120 + blotches[:, :crop, :crop] + random.normal(0, 20, (batch, crop, crop, 3))
        yield {
            "images": pictures.clip(0, 255).astype(np.uint8),
            "corner": random.integers(0, room, (batch, 2)).astype(np.int32),
            "flip": random.integers(0, 2, batch).astype(np.uint8),
            "shift": random.normal(0, 5 if config.input.jitter else 0, (batch, 3)).astype(np.float32),
            "labels": random.integers(0, classes, batch).astype(np.int32),
        }
