"""What a training run draws: order, crop corners, flips and colour shifts, as pure functions.

Everything depends on (seed, epoch, position) alone, where position counts the pictures of an epoch in the order they
are used. Nothing is carried from batch to batch, so a run can be taken up anywhere, and any number of workers or
machines draws the same.

The draws come from NumPy's Philox bit generator, whose raw stream NumPy guarantees to stay the same: its key is
(seed, purpose and epoch), its counter the position, and each position owns one block of four 64-bit words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

BLOCK: Final = 64  # pictures read in one go in the block-wise order: 12.6 MB
OPEN_BLOCKS: Final = 64  # blocks whose pictures are mixed: 4,096 pictures, 0.8 GB

_ORDER, _PICTURE, _COLOUR, _BLOCKS = 1, 2, 3, 4  # what a stream is for, so that no two purposes share one
_WORDS: Final = 4  # 64-bit words in a Philox block


@dataclass(frozen=True)
class Crops:
    """What is taken from the stored pictures for one batch.

    Attributes
    ----------
    index : int64 (N,)
        Row in the split.
    corner : int32 (N, 2)
        Row and column of the crop's upper left pixel in the stored picture.
    flip : uint8 (N,)
        1 where the crop is mirrored left to right.
    shift : float32 (N, 3)
        Colour shift to add to red, green and blue, on the 0..255 scale.
    """

    index: np.ndarray
    corner: np.ndarray
    flip: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training crops are drawn (paper, section 4.1).

    ``directions`` holds, a row each, the eigenvectors of the RGB covariance times the standard deviation along them,
    on the 0..255 scale; ``jitter`` is the standard deviation of the draw that multiplies each.
    """

    size: int  # side of the stored picture
    crop: int  # side of the crop
    random_crop: bool
    flip: bool
    jitter: float
    directions: np.ndarray  # float64 (3, 3)


def steps_per_epoch(pictures: int, batch_size: int) -> int:
    """Batches in an epoch; the last one is smaller where the pictures do not divide evenly."""
    return -(-pictures // batch_size)


def epoch_order(pictures: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which epoch ``epoch`` uses the pictures: a permutation of range(pictures), int64.

    Each picture draws a 64-bit number; the pictures are sorted by it (ties, one in 10^7 for a million pictures, by
    number).
    """
    return np.argsort(_draws(seed, _ORDER, epoch, pictures), kind="stable")


def block_groups(pictures: int, seed: int, epoch: int, block: int = BLOCK, opened: int = OPEN_BLOCKS) -> np.ndarray:
    """The block-wise order's groups: for each block of ``block`` neighbouring pictures, the group that holds it, int64.

    The blocks are permuted, and each ``opened`` of them in that order are a group.
    """
    blocks = -(-pictures // block)
    group = np.empty(blocks, dtype=np.int64)
    group[np.argsort(_draws(seed, _BLOCKS, epoch, blocks), kind="stable")] = np.arange(blocks) // opened
    return group


def group_ends(groups: np.ndarray, pictures: int, block: int = BLOCK) -> np.ndarray:
    """The position in the epoch at which each group ends, int64; ``groups`` as :func:`block_groups` gives them."""
    sizes = np.full(len(groups), block)
    sizes[-1] = pictures - block * (len(groups) - 1)
    return np.cumsum(np.bincount(groups, weights=sizes)).astype(np.int64)


def block_order(pictures: int, seed: int, epoch: int, block: int = BLOCK, opened: int = OPEN_BLOCKS) -> np.ndarray:
    """The block-wise order of an epoch, for sets larger than memory: a permutation of range(pictures), int64.

    Groups follow each other; within a group the pictures of all its blocks are shuffled together, by the draws that
    :func:`epoch_order` sorts the whole set by. The disk thus reads whole blocks, and each group only once an epoch.
    """
    group = np.repeat(block_groups(pictures, seed, epoch, block, opened), block)[:pictures]
    return np.lexsort((_draws(seed, _ORDER, epoch, pictures), group))


def training_crops(order: np.ndarray, first: int, last: int, seed: int, epoch: int, how: Augmentation) -> Crops:
    """Crops for the positions ``first`` to ``last - 1`` of an epoch whose order is ``order``.

    Corners are uniform over all (size - crop + 1)^2 places, flips happen with probability 1/2, and the colour shift
    is the sum over the three eigenvectors of N(0, jitter) times eigenvector times standard deviation, one draw a
    picture (paper, section 4.1, as its authors' code has it).
    """
    count = last - first
    places = how.size - how.crop + 1
    words = _blocks(seed, _PICTURE, epoch, first, count)
    if how.random_crop:
        corner = np.stack([_below(words[:, 0], places), _below(words[:, 1], places)], axis=1)
    else:
        corner = np.full((count, 2), (how.size - how.crop) // 2, dtype=np.int32)
    flip = (words[:, 2] >> np.uint64(63)).astype(np.uint8) if how.flip else np.zeros(count, dtype=np.uint8)
    if how.jitter:
        draws = _normal(_blocks(seed, _COLOUR, epoch, first, count)) * how.jitter
        shift = (draws @ how.directions).astype(np.float32)
    else:
        shift = np.zeros((count, 3), dtype=np.float32)
    return Crops(order[first:last], corner, flip, shift)


def view_crops(first: int, last: int, views: int, size: int, crop: int) -> Crops:
    """Crops for evaluating the pictures ``first`` to ``last - 1``: ``views`` of each, next to each other.

    One view is the centre; ten are the four corners and the centre, and the same mirrored (paper, section 4.1).
    """
    end, middle = size - crop, (size - crop) // 2
    places = [(middle, middle)] if views == 1 else [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)] * 2
    mirrored = [0] if views == 1 else [0] * 5 + [1] * 5
    count = last - first
    return Crops(
        index=np.repeat(np.arange(first, last), views),
        corner=np.tile(np.array(places, dtype=np.int32), (count, 1)),
        flip=np.tile(np.array(mirrored, dtype=np.uint8), count),
        shift=np.zeros((count * views, 3), dtype=np.float32),
    )


def _blocks(seed: int, purpose: int, epoch: int, first: int, count: int) -> np.ndarray:
    """Blocks ``first`` to ``first + count - 1`` of a stream, uint64 (count, 4)."""
    stream = np.random.Philox(key=np.array([seed, purpose << 32 | epoch], dtype=np.uint64))
    stream.advance(first)
    return stream.random_raw(count * _WORDS).reshape(count, _WORDS)


def _draws(seed: int, purpose: int, epoch: int, count: int) -> np.ndarray:
    """The first ``count`` words of a stream, uint64: what orders are sorted by takes one word, not a block."""
    return _blocks(seed, purpose, epoch, 0, -(-count // _WORDS)).ravel()[:count]


def _below(words: np.ndarray, limit: int) -> np.ndarray:
    """Uniform integers in [0, limit) from the upper 32 bits of each word; the bias is below limit / 2^32."""
    return ((words >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32)).astype(np.int32)


def _normal(words: np.ndarray) -> np.ndarray:
    """Three standard normal numbers from each block of four words, by Box and Muller's method."""
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2 * np.log(uniform[:, [0, 1]]))
    angle = 2 * np.pi * uniform[:, [2, 3]]
    return np.concatenate([radius * np.cos(angle), radius[:, :1] * np.sin(angle[:, :1])], axis=1)
