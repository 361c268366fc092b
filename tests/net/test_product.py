"""The panels of a matrix product against float64, and two panels at a time against one, to the last bit."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from net.cpu.product import add_times_panels, times_panels
from net.cpu.simd import BLOCK, LANES, PANEL, PIECE, lines

GAP = LANES  # numbers between rows and panels, which nobody may touch
DEPTHS = (1, PIECE - 1, PIECE, PIECE + PIECE // 2, PIECE + PIECE // 2 + 1, 49)


@numba.njit
def times(a, b, c, vectors):
    times_panels(
        a.reshape(-1), 0, a.shape[1], b.reshape(-1), 0, b[0].size, c.reshape(-1), 0, PANEL + GAP,
        c[0].size, a.shape[0], vectors, a.shape[1],
    )  # fmt: skip


@numba.njit
def add_times(a, a_row, a_step, rows, b, c):
    add_times_panels(
        a.reshape(-1), 0, a_row, a_step, b.reshape(-1), 0, b[0].size, c.reshape(-1), 0, PANEL + GAP,
        c[0].size, rows, b.shape[0], b.shape[1], lines(2 * BLOCK * PANEL),
    )  # fmt: skip


def operands(rows: int, depth: int, panels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a (rows, depth), panels of b (panels, depth, PANEL), and c with gaps, all its numbers set."""
    random = np.random.default_rng([rows, depth, panels])
    a, b = random.standard_normal((rows, depth)), random.standard_normal((panels, depth, PANEL))
    c = random.standard_normal((panels, rows, PANEL + GAP))
    return a.astype(np.float32), b.astype(np.float32), c.astype(np.float32)


@pytest.mark.parametrize("rows", [1, 5, BLOCK, BLOCK + 1, 2 * BLOCK + 4])
@pytest.mark.parametrize("depth", DEPTHS)
def test_product(rows: int, depth: int) -> None:
    for vectors in range(1, 8):
        a, b, before = operands(rows, depth, (vectors + 1) // 2)
        c, one_by_one = before.copy(), before.copy()
        times(a, b, c, vectors)
        for panel in range(len(b)):
            times(a, b[panel : panel + 1], one_by_one[panel : panel + 1], min(2, vectors - 2 * panel))
        np.testing.assert_array_equal(c, one_by_one)
        computed = np.zeros(c.shape, bool)
        for vector in range(vectors):
            computed[vector // 2, :, vector % 2 * LANES :][:, :LANES] = True
        np.testing.assert_array_equal(c[~computed], before[~computed])
        exact = np.zeros(c.shape)
        exact[..., :PANEL] = a.astype(np.float64) @ b.astype(np.float64)
        np.testing.assert_allclose(c[computed], exact[computed], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, BLOCK, BLOCK + 1, 2 * BLOCK + 4])
@pytest.mark.parametrize("depth", DEPTHS)
def test_product_added(rows: int, depth: int) -> None:
    for panels in range(1, 5):
        a, b, before = operands(rows, depth, panels)
        c, product = before.copy(), np.zeros_like(before)
        add_times(a, depth, 1, rows, b, c)
        times(a, b, product, 2 * panels)
        np.testing.assert_array_equal(c, before + product)
        turned = before.copy()
        add_times(np.ascontiguousarray(a.T), 1, rows, rows, b, turned)
        np.testing.assert_array_equal(turned, c)


def test_lines_begin_at_a_cache_line() -> None:
    @numba.njit
    def address(count):
        return lines(count).ctypes.data

    assert all(address(count) % 64 == 0 for count in range(1, 40))
