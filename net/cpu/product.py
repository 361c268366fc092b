"""Panels of a matrix product: the micro-kernel of ``simd.py`` run down a column of blocks.

Three forms, for the three ways in which the left operand lies. The right operand is a panel (depth, PANEL) whose rows
follow each other; arrays are flat, offsets and steps are counted in elements. Sums are computed in the order of depth,
wherever a block begins, so results do not depend on how the work is divided.
"""

from __future__ import annotations

import numpy as np

from net.cpu.jit import inner
from net.cpu.simd import BLOCK, multiply_block


@inner
def rows_times_panel(
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
    """``c = a b``: a (rows, depth) with rows ``a_row`` apart, c (rows, PANEL) with rows ``c_row`` apart."""
    i = 0
    while i + BLOCK <= rows:
        multiply_block(BLOCK, 2, 0, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)
        i += BLOCK
    if rows - i == 5:
        multiply_block(5, 2, 0, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)
    elif rows - i == 4:
        multiply_block(4, 2, 0, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)
    elif rows - i == 3:
        multiply_block(3, 2, 0, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)
    elif rows - i == 2:
        multiply_block(2, 2, 0, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)
    elif rows - i == 1:
        multiply_block(1, 2, 0, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)


@inner
def rows_times_half_panel(
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
    while i + BLOCK <= rows:
        multiply_block(BLOCK, 1, 0, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)
        i += BLOCK
    if rows - i >= 3:
        multiply_block(3, 1, 0, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)
        i += 3
    while i < rows:
        multiply_block(1, 1, 0, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)
        i += 1


@inner
def add_rows_times_panel(
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
    """``c += a b``: a (rows, depth) with rows ``a_row`` apart, c (rows, PANEL) with rows ``c_row`` apart."""
    i = 0
    while i + BLOCK <= rows:
        multiply_block(BLOCK, 2, 1, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)
        i += BLOCK
    if rows - i == 5:
        multiply_block(5, 2, 1, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)
    elif rows - i == 4:
        multiply_block(4, 2, 1, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)
    elif rows - i == 3:
        multiply_block(3, 2, 1, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)
    elif rows - i == 2:
        multiply_block(2, 2, 1, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)
    elif rows - i == 1:
        multiply_block(1, 2, 1, a, a_at + i * a_row, a_row, 1, b, b_at, c, c_at + i * c_row, c_row, depth)


@inner
def add_columns_times_panel(
    a: np.ndarray,
    a_at: int,
    a_step: int,
    b: np.ndarray,
    b_at: int,
    c: np.ndarray,
    c_at: int,
    c_row: int,
    rows: int,
    depth: int,
) -> None:
    """``c += aᵀ b``: a (depth, rows) with rows ``a_step`` apart, c (rows, PANEL) with rows ``c_row`` apart."""
    i = 0
    while i + BLOCK <= rows:
        multiply_block(BLOCK, 2, 1, a, a_at + i, 1, a_step, b, b_at, c, c_at + i * c_row, c_row, depth)
        i += BLOCK
    if rows - i == 5:
        multiply_block(5, 2, 1, a, a_at + i, 1, a_step, b, b_at, c, c_at + i * c_row, c_row, depth)
    elif rows - i == 4:
        multiply_block(4, 2, 1, a, a_at + i, 1, a_step, b, b_at, c, c_at + i * c_row, c_row, depth)
    elif rows - i == 3:
        multiply_block(3, 2, 1, a, a_at + i, 1, a_step, b, b_at, c, c_at + i * c_row, c_row, depth)
    elif rows - i == 2:
        multiply_block(2, 2, 1, a, a_at + i, 1, a_step, b, b_at, c, c_at + i * c_row, c_row, depth)
    elif rows - i == 1:
        multiply_block(1, 2, 1, a, a_at + i, 1, a_step, b, b_at, c, c_at + i * c_row, c_row, depth)
