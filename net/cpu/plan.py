"""Which algorithm computes each convolution.

"winograd" is ``winograd.py``, where it has transforms for the filter, "im2col" is ``im2col.py``. The choice follows
from the shapes alone, never from a trial at run time, so a run is repeatable. docs/cpu.md has what each layer of
AlexNet takes, and why.
"""

from __future__ import annotations

from typing import Literal

from net.cpu import winograd

Algorithm = Literal["winograd", "im2col"]


def forward(w: tuple[int, ...], stride: int, groups: int) -> Algorithm:
    """The algorithm for y, given the shape of w (KH, KW, Cin / groups, Cout)."""
    return "winograd" if winograd.applies(w[0], w[1], stride, groups) else "im2col"


def backward_weights(w: tuple[int, ...], stride: int, groups: int) -> Algorithm:
    """The algorithm for dw."""
    return "winograd" if winograd.applies(w[0], w[1], stride, groups) else "im2col"


def backward_input(w: tuple[int, ...], stride: int, pad: int, groups: int) -> Algorithm:
    """The algorithm for dx. As a convolution of dy it would need a stride below 1, so strides are left to im2col."""
    suits = stride == 1 and pad < w[0] and winograd.applies(w[0], w[1], 1, groups)
    return "winograd" if suits else "im2col"
