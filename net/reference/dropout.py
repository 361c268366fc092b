"""Dropout (paper, section 4.2: keep = 0.5 in fc6 and fc7).

Shapes
    x, y of any one shape, float32, or float64 in checks

Forward
    ``y = x * mask * scale``, where mask is 1 with probability ``keep`` and 0 otherwise, independently for each
    element. On average over the masks, y is ``keep * scale * x``, and that is what the next layer learns to expect. At
    test time nothing is dropped, so x has to be multiplied by keep * scale then. The paper trains with scale = 1 and
    multiplies by keep at test time; Caffe trains with scale = 1 / keep, so its factor at test time is 1.

Backward
    mask and scale do not depend on x: ``dx = dy * mask * scale``.

The mask is a pure function of ``key`` = (seed, step, layer) and of the element's place e in C order in the whole batch,
so it is drawn again in the backward pass instead of being kept, and is the same on every backend. ``first`` is the
place in the batch of x's first row: a process that computes rows 64 to 127 of a batch draws the mask they have in the
whole. Element e uses word e % 4 of Philox4x32-10 (``philox.py``), whose own key is the seed alone, with::

    counter = (e // 4, layer, step mod 2³², step div 2³²)      key = (seed mod 2³², seed div 2³²)

and is kept where that word, uniform on 0 .. 2³² - 1, is below floor(keep * 2³²).

Example
    >>> options = {"keep": 0.5, "scale": 2.0, "key": (0, 0, 6)}  # seed 0, step 0, fc6
    >>> dropout_forward(np.arange(1.0, 9.0), **options)
    array([ 2.,  0.,  0.,  8.,  0., 12., 14., 16.])
    >>> dropout_backward(np.ones(8), **options)  # the same mask
    array([2., 0., 0., 2., 0., 2., 2., 2.])
    >>> float(dropout_forward(np.ones(100_000), **options).mean().round(1))
    1.0
"""

from __future__ import annotations

import math

import numpy as np

from net.reference.philox import philox4x32

Key = tuple[int, int | np.ndarray, int]  # seed, step (a number or an array of one), layer


def dropout_forward(x: np.ndarray, *, keep: float, scale: float, key: Key, first: int | np.ndarray = 0) -> np.ndarray:
    """x -> y of the same shape; keep the key."""
    return x * dropout_mask(x.shape, keep, key, first) * scale


def dropout_backward(dy: np.ndarray, *, keep: float, scale: float, key: Key, first: int | np.ndarray = 0) -> np.ndarray:
    """dy -> dx of the same shape."""
    return dy * dropout_mask(dy.shape, keep, key, first) * scale


def dropout_mask(shape: tuple[int, ...], keep: float, key: Key, first: int | np.ndarray = 0) -> np.ndarray:
    """Boolean mask, True where the element is kept; ``first`` is the place of the first row in the batch."""
    seed, step, layer = int(key[0]), int(np.asarray(key[1]).item()), int(key[2])
    size = math.prod(shape)
    start = int(np.asarray(first).item()) * math.prod(shape[1:])
    blocks = np.arange(start // 4, -(-(start + size) // 4))
    words = philox4x32((blocks, layer, step % 2**32, step >> 32), (seed % 2**32, seed >> 32))
    drawn = np.stack(words, axis=-1).reshape(-1)[start % 4 :][:size]
    # keep = 1 makes the bound 2**32, one more than fits 32 bits: every word is below it.
    return (drawn.astype(np.uint64) < np.uint64(math.floor(keep * 2**32))).reshape(shape)
