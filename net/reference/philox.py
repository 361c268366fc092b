"""Philox4x32-10, a counter-based random number generator.

J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

A block cipher in miniature: a counter of four 32-bit words is scrambled under a key of two words, in ten rounds, into
four random words. There is no state to carry along. Element 1,000,000 of a mask costs as much as element 0, threads
and GPUs may compute any part in any order, and a run that is resumed needs to know its step and nothing else.
Dropout (``dropout.py``) draws its masks with it.

One round, with the counter (c0, c1, c2, c3), the key (k0, k1), constants M0 and M1, and each 64-bit product split into
its high and low 32 bits::

    (c0, c1, c2, c3)  ->  (high(M1 c2) ^ c1 ^ k0,  low(M1 c2),  high(M0 c0) ^ c3 ^ k1,  low(M0 c0))

and before the next round ``k0 += W0``, ``k1 += W1``, modulo 2³², W0 and W1 being constants too. (^ is exclusive or.)

Example
    The first of the test vectors that its authors publish:

    >>> [f"{int(word):08x}" for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike

M0: Final = np.uint64(0xD2511F53)
M1: Final = np.uint64(0xCD9E8D57)
W0: Final = 0x9E3779B9  # the golden ratio's fraction
W1: Final = 0xBB67AE85  # the fraction of the square root of 3
ROUNDS: Final = 10

_LOW: Final = np.uint64(0xFFFFFFFF)
_32: Final = np.uint64(32)


def philox4x32(
    counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Four random words for each counter.

    ``counter`` is four numbers or arrays of numbers below 2³² that broadcast together, ``key`` two such numbers; the
    result is four uint32 arrays of the common shape.
    """
    # 64-bit words hold the products of 32-bit words.
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in np.broadcast_arrays(*counter))
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = M0 * c0, M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> _32) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _32) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + W0) % 2**32, (k1 + W1) % 2**32
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)
