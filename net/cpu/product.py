"""Panels of a matrix product: the micro-kernels of ``simd.py`` run down columns of blocks.

The right operand comes in panels (depth, PANEL) whose rows follow each other; arrays are flat, offsets and steps are
counted in elements. Where registers allow it two panels are multiplied at a time. Sums are computed in the order of
depth, wherever a block begins and however many panels it spans, so results depend neither on how the work is divided
nor on the processor's registers.
"""

from __future__ import annotations

import numpy as np

from net.cpu.jit import inner
from net.cpu.simd import BLOCK, WIDE, multiply_block, multiply_wide_block


@inner
def times_panels(
    a: np.ndarray,
    a_at: int,
    a_row: int,
    b: np.ndarray,
    b_at: int,
    b_panel: int,
    c: np.ndarray,
    c_at: int,
    c_row: int,
    c_panel: int,
    rows: int,
    vectors: int,
    depth: int,
) -> None:
    """``c = a b``: a (rows, depth) with rows ``a_row`` apart; panels of b begin ``b_panel`` apart; c, for each panel
    (rows, PANEL), has rows ``c_row`` apart, and panels ``c_panel``.

    ``vectors`` counts the vectors of columns in all panels. Where it is odd, the second half of the last panel is
    padding and is not computed.
    """
    while vectors > 0:
        now = min(vectors, 4 if WIDE else 2)
        i = 0
        while i + BLOCK <= rows:
            at, to = a_at + i * a_row, c_at + i * c_row
            if WIDE and now == 4:
                multiply_wide_block(BLOCK, 4, 0, a, at, a_row, 1, b, b_at, b_panel, c, to, c_row, c_panel, depth, c)
            elif WIDE and now == 3:
                multiply_wide_block(BLOCK, 3, 0, a, at, a_row, 1, b, b_at, b_panel, c, to, c_row, c_panel, depth, c)
            elif now == 2:
                multiply_block(BLOCK, 2, 0, a, at, a_row, 1, b, b_at, c, to, c_row, depth)
            else:
                multiply_block(BLOCK, 1, 0, a, at, a_row, 1, b, b_at, c, to, c_row, depth)
            i += BLOCK
        vectors -= now
        at, to = a_at + i * a_row, c_at + i * c_row
        if WIDE and now == 4 and rows - i == 1:
            multiply_wide_block(1, 4, 0, a, at, a_row, 1, b, b_at, b_panel, c, to, c_row, c_panel, depth, c)
            i = rows
        while now > 0:
            if now > 1:
                _last_rows(a, at, a_row, b, b_at, c, to, c_row, rows - i, depth)
            else:
                _last_rows_of_half(a, at, a_row, b, b_at, c, to, c_row, rows - i, depth)
            now, b_at, c_at, to = now - 2, b_at + b_panel, c_at + c_panel, to + c_panel


@inner
def _last_rows(
    a: np.ndarray,
    a_at: int,
    a_row: int,
    b: np.ndarray,
    b_at: int,
    c: np.ndarray,
    c_at: int,
    c_row: int,
    rows: int,
    depth: int,
) -> None:
    """``c = a b`` for one panel and fewer rows than a block has."""
    if rows == 5:
        multiply_block(5, 2, 0, a, a_at, a_row, 1, b, b_at, c, c_at, c_row, depth)
    elif rows == 4:
        multiply_block(4, 2, 0, a, a_at, a_row, 1, b, b_at, c, c_at, c_row, depth)
    elif rows == 3:
        multiply_block(3, 2, 0, a, a_at, a_row, 1, b, b_at, c, c_at, c_row, depth)
    elif rows == 2:
        multiply_block(2, 2, 0, a, a_at, a_row, 1, b, b_at, c, c_at, c_row, depth)
    elif rows == 1:
        multiply_block(1, 2, 0, a, a_at, a_row, 1, b, b_at, c, c_at, c_row, depth)


@inner
def _last_rows_of_half(
    a: np.ndarray,
    a_at: int,
    a_row: int,
    b: np.ndarray,
    b_at: int,
    c: np.ndarray,
    c_at: int,
    c_row: int,
    rows: int,
    depth: int,
) -> None:
    """The same for the first half of the panel's columns alone: where padding fills the rest, it costs nothing."""
    i = 0
    if rows >= 3:
        multiply_block(3, 1, 0, a, a_at, a_row, 1, b, b_at, c, c_at, c_row, depth)
        i = 3
    while i < rows:
        multiply_block(1, 1, 0, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)
        i += 1


@inner
def add_times_panels(
    a: np.ndarray,
    a_at: int,
    a_row: int,
    a_step: int,
    b: np.ndarray,
    b_at: int,
    b_panel: int,
    c: np.ndarray,
    c_at: int,
    c_row: int,
    c_panel: int,
    rows: int,
    panels: int,
    depth: int,
    part: np.ndarray,
) -> None:
    """``c += a b`` for whole panels, and a whose elements of a row are ``a_step`` apart: with ``a_row`` 1 a product by
    aᵀ. ``part`` (2 BLOCK PANEL) is scratch.
    """
    panel = 0
    while panel < panels:
        together = 2 if WIDE and panel + 1 < panels else 1
        i = 0
        while i + BLOCK <= rows:
            at, to = a_at + i * a_row, c_at + i * c_row
            if WIDE and together == 2:
                multiply_wide_block(
                    BLOCK, 4, 1, a, at, a_row, a_step, b, b_at, b_panel, c, to, c_row, c_panel, depth, part
                )
            else:
                multiply_block(BLOCK, 2, 1, a, at, a_row, a_step, b, b_at, c, to, c_row, depth)
            i += BLOCK
        at = a_at + i * a_row
        for _ in range(together):
            to = c_at + i * c_row
            if rows - i == 5:
                multiply_block(5, 2, 1, a, at, a_row, a_step, b, b_at, c, to, c_row, depth)
            elif rows - i == 4:
                multiply_block(4, 2, 1, a, at, a_row, a_step, b, b_at, c, to, c_row, depth)
            elif rows - i == 3:
                multiply_block(3, 2, 1, a, at, a_row, a_step, b, b_at, c, to, c_row, depth)
            elif rows - i == 2:
                multiply_block(2, 2, 1, a, at, a_row, a_step, b, b_at, c, to, c_row, depth)
            elif rows - i == 1:
                multiply_block(1, 2, 1, a, at, a_row, a_step, b, b_at, c, to, c_row, depth)
            panel, b_at, c_at = panel + 1, b_at + b_panel, c_at + c_panel
