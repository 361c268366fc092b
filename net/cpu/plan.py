"""Which algorithm computes each convolution: one table, filled in by measurement.

"winograd" is ``winograd.py``, "im2col" is ``im2col.py``. The choice follows from the shapes alone, never from a trial
at run time, so a run is repeatable.
"""

from __future__ import annotations

from net.cpu import winograd


def forward(x: tuple[int, ...], w: tuple[int, ...], stride: int, groups: int) -> str:
    """The algorithm for y, given the shapes of x and w."""
    return "winograd" if winograd.applies(w[0], w[1], stride, groups) else "im2col"


def backward_weights(x: tuple[int, ...], w: tuple[int, ...], stride: int, groups: int) -> str:
    """The algorithm for dw."""
    return "winograd" if winograd.applies(w[0], w[1], stride, groups) else "im2col"


def backward_input(x: tuple[int, ...], w: tuple[int, ...], stride: int, pad: int, groups: int) -> str:
    """The algorithm for dx. As a convolution of dy it would need a stride below 1, so strides are left to im2col."""
    suits = stride == 1 and pad < w[0] and winograd.applies(w[0], w[1], 1, groups)
    return "winograd" if suits else "im2col"
