"""Calls whose arrays do not fit each other: a kernel would read beyond one of them, so each must be refused before."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

CONV = {"stride": 1, "pad": 1, "groups": 1}
POOL = {"size": 3, "stride": 2}
NORM = {"size": 5, "alpha": 1.0, "beta": 0.75}
SGD = {"lr": 0.1, "momentum": 0.9, "decay": 0.0}
DRAWS = {"mean": None, "scale": 1.0, "bgr": False, "border": (0, 0)}


def _calls(ops: ModuleType) -> dict[str, Callable[[], Any]]:
    def of(*shape: int, dtype: str = "float32") -> Any:
        return ops.asarray(np.ones(shape, dtype))

    def after(forward: Callable[..., Any], backward: Callable[..., Any], *given: Any, **options: Any) -> Any:
        _, kept = forward(of(2, 9, 9, 4), of(3, 3, 4, 8), of(8), **CONV, training=True, **options)
        return backward(*given[:1], kept, of(3, 3, 4, 8), **CONV, need_dx=True, **options)

    x, w, b, y = of(2, 9, 9, 4), of(3, 3, 4, 8), of(8), of(2, 9, 9, 8)
    images, corner = of(2, 6, 6, 3, dtype="uint8"), of(2, 2, dtype="int32")
    flip, shift = of(2, dtype="uint8"), of(2, 3)
    pooled, winner = of(2, 4, 4, 4), of(2, 4, 4, 4, dtype="uint8")
    calls: dict[str, Callable[[], Any]] = {
        "conv2d_forward, channels": lambda: ops.conv2d_forward(of(2, 9, 9, 2), w, b, **CONV),
        "conv2d_forward, bias": lambda: ops.conv2d_forward(x, w, of(3), **CONV),
        "conv2d_forward, groups": lambda: ops.conv2d_forward(x, of(3, 3, 1, 8), b, stride=1, pad=1, groups=3),
        "conv2d_forward, no picture": lambda: ops.conv2d_forward(of(0, 9, 9, 4), w, b, **CONV),
        "conv2d_forward, too small": lambda: ops.conv2d_forward(of(2, 9, 2, 4), w, b, stride=1, pad=0, groups=1),
        "conv2d_backward, dy": lambda: ops.conv2d_backward(of(2, 8, 9, 8), x, w, **CONV),
        "conv2d_backward, batch": lambda: ops.conv2d_backward(of(1, 9, 9, 8), x, w, **CONV),
        "relu_backward": lambda: ops.relu_backward(x, y),
        "lrn_backward, dy": lambda: ops.lrn_backward(x, y, y, **NORM),
        "lrn_backward, s": lambda: ops.lrn_backward(y, y, x, **NORM),
        "map_norm_backward, dy": lambda: ops.map_norm_backward(x, y, y, **NORM),
        "map_norm_backward, s": lambda: ops.map_norm_backward(y, y, x, **NORM),
        "maxpool_forward": lambda: ops.maxpool_forward(of(2, 9, 2, 4), **POOL),
        "maxpool_backward, winner": lambda: ops.maxpool_backward(
            pooled, of(2, 4, 3, 4, dtype="uint8"), height=9, width=9, **POOL
        ),
        "maxpool_backward, sides": lambda: ops.maxpool_backward(pooled, winner, height=13, width=9, **POOL),
        "linear_forward, features": lambda: ops.linear_forward(of(2, 5), of(6, 10), of(10)),
        "linear_forward, bias": lambda: ops.linear_forward(of(2, 6), of(6, 10), of(9)),
        "linear_backward, dy": lambda: ops.linear_backward(of(2, 9), of(2, 6), of(6, 10)),
        "linear_backward, x": lambda: ops.linear_backward(of(2, 10), of(2, 5), of(6, 10)),
        "cross_entropy": lambda: ops.cross_entropy(of(4, 10), of(3, dtype="int32")),
        "sgd_update, dw": lambda: ops.sgd_update(of(100, 100), of(100, 100), of(10, 10), **SGD),
        "sgd_update, v": lambda: ops.sgd_update(of(100, 100), of(10, 10), of(100, 100), **SGD),
        "augment, corner": lambda: ops.augment(images, of(1, 2, dtype="int32"), flip, shift, **DRAWS),
        "augment, flip": lambda: ops.augment(images, corner, of(1, dtype="uint8"), shift, **DRAWS),
        "augment, shift": lambda: ops.augment(images, corner, flip, of(1, 3), **DRAWS),
    }
    if hasattr(ops, "conv_block_forward"):
        blocks = ops.conv_block_forward, ops.conv_block_backward
        calls |= {
            "conv_block_forward, bias": lambda: ops.conv_block_forward(
                x, w, of(3), **CONV, lrn=None, pool=None, training=True
            ),
            "conv_block_backward, dy": lambda: after(*blocks, of(2, 9, 9, 4), lrn=None, pool=None),
            "conv_block_backward, pooled dy": lambda: after(*blocks, of(2, 9, 9, 8), lrn=None, pool=(3, 2)),
        }
    return calls


def taken(ops: ModuleType) -> list[str]:
    """The calls that a backend does not refuse with a ValueError; there should be none."""
    return [name for name, call in _calls(ops).items() if not _refused(call)]


def _refused(call: Callable[[], Any]) -> bool:
    try:
        call()
    except ValueError:
        return True
    return False
