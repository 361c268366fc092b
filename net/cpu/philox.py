"""Philox4x32-10, the counter-based generator behind the dropout masks, for use inside kernels.

The algorithm and its source are described in ``net/reference/philox.py``; the words are the same on every backend.
"""

from __future__ import annotations

import numpy as np

from net.cpu.jit import inner


@inner
def philox4x32(
    c0: np.uint32, c1: np.uint32, c2: np.uint32, c3: np.uint32, k0: np.uint32, k1: np.uint32
) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32]:
    """Four random words for one counter under one key."""
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * np.uint64(c0)
        p1 = np.uint64(0xCD9E8D57) * np.uint64(c2)
        c0, c1, c2, c3 = (
            np.uint32((p1 >> np.uint64(32)) ^ c1 ^ k0),
            np.uint32(p1),
            np.uint32((p0 >> np.uint64(32)) ^ c3 ^ k1),
            np.uint32(p0),
        )
        k0 = np.uint32(k0 + np.uint32(0x9E3779B9))
        k1 = np.uint32(k1 + np.uint32(0xBB67AE85))
    return c0, c1, c2, c3
