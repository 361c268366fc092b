"""What the fast backends ask before they start a kernel, which would read beyond an array that is too small."""

from __future__ import annotations

from net.layers import Array, Shape


def require_shape(name: str, array: Array, wanted: Shape) -> None:
    """Raise a ValueError that names the array unless its shape is the one wanted."""
    if tuple(array.shape) != tuple(wanted):
        raise ValueError(f"{name} has shape {tuple(array.shape)}, not {tuple(wanted)}")


def windows(length: int, size: int, stride: int, pad: int = 0) -> int:
    """How many windows of ``size`` pixels lie along a side of ``length``; a ValueError where there is none."""
    count = (length + 2 * pad - size) // stride + 1
    if count < 1:
        raise ValueError(f"no window of {size} pixels fits into {length} with {pad} zeros at either end")
    return count
