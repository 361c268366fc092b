"""The network's other operations, one kernel each: augmentation, ReLU, normalisations, pooling, dropout, loss, update.

Formulas stand at the head of the .cu files. Each works in the type its input has: float32, or bfloat16 for pictures
under ``--precision bf16``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from net.gpu import beside
from net.gpu.arrays import blocks, cast, dense, empty, floats
from net.gpu.device import current
from net.gpu.kernels import THREADS, launch
from net.layers import Array
from net.shapes import require_shape, windows

Key = tuple[int, Any, int]  # seed, step (a number or an array of one), layer


def augment(
    images: Array,
    corner: Array,
    flip: Array,
    shift: Array,
    *,
    mean: Array | None,
    scale: float,
    bgr: bool,
    border: tuple[int, int],
) -> Array:
    """uint8 crops (N, H, W, 3) -> pictures (N, H + border, W + border, 3)."""
    count, height, width, _ = images.shape
    for name, array, wanted in (("corner", corner, (count, 2)), ("flip", flip, (count,)), ("shift", shift, (count, 3))):
        require_shape(name, array, wanted)
    before, after = border
    y = empty((count, height + before + after, width + before + after, 3), current().storage)
    side = 0 if mean is None else mean.shape[0]
    mean = None if mean is None else floats(mean)
    launch(
        "augment",
        (count * y.shape[1],),
        (
            *(dense(images), dense(corner), dense(flip), floats(shift), mean, y),
            *(height, width, side, before, after, scale, bgr),
        ),
        dtype=y.dtype,
    )
    return y


def relu_forward(x: Array) -> Array:
    """y = 0 where x < 0, else x; any shape."""
    x = dense(x)
    y = empty(x.shape, x.dtype)
    launch("relu_forward", blocks(x.size), (x, y, x.size), dtype=x.dtype)
    return y


def relu_backward(dy: Array, y: Array) -> Array:
    """dx = dy where y > 0, else 0."""
    y = dense(y)
    require_shape("dy", dy, y.shape)
    dx = empty(y.shape, y.dtype)
    launch("relu_backward", blocks(y.size), (cast(dense(dy), y.dtype), y, dx, y.size), dtype=y.dtype)
    return dx


def lrn_forward(x: Array, *, size: int, k: float, alpha: float, beta: float) -> tuple[Array, Array]:
    """x (..., C) -> y like x, s float32."""
    x = dense(x)
    y, s = empty(x.shape, x.dtype), empty(x.shape, "float32")
    arguments = (x, y, s, x.size, x.shape[-1], size // 2, k, alpha, beta)
    launch("lrn_forward", blocks(x.size), arguments, dtype=x.dtype)
    return y, s


def lrn_backward(dy: Array, x: Array, s: Array, *, size: int, alpha: float, beta: float) -> Array:
    """dx like x."""
    x = dense(x)
    dx = empty(x.shape, x.dtype)
    require_shape("dy", dy, x.shape)
    require_shape("s", s, x.shape)
    arguments = (cast(dense(dy), x.dtype), x, floats(s), dx, x.size, x.shape[-1], size // 2, alpha, beta)
    launch("lrn_backward", blocks(x.size), arguments, dtype=x.dtype)
    return dx


def map_norm_forward(x: Array, *, size: int, k: float, alpha: float, beta: float) -> tuple[Array, Array]:
    """x (N, H, W, C) -> y like x, s float32."""
    x = dense(x)
    y, s = empty(x.shape, x.dtype), empty(x.shape, "float32")
    arguments = (x, y, s, x.size, *x.shape[1:], size // 2, k, alpha, beta)
    launch("map_norm_forward", blocks(x.size), arguments, dtype=x.dtype)
    return y, s


def map_norm_backward(dy: Array, x: Array, s: Array, *, size: int, alpha: float, beta: float) -> Array:
    """dx like x."""
    x = dense(x)
    dx = empty(x.shape, x.dtype)
    require_shape("dy", dy, x.shape)
    require_shape("s", s, x.shape)
    arguments = (cast(dense(dy), x.dtype), x, floats(s), dx, x.size, *x.shape[1:], size // 2, alpha, beta)
    launch("map_norm_backward", blocks(x.size), arguments, dtype=x.dtype)
    return dx


def maxpool_forward(x: Array, *, size: int, stride: int) -> tuple[Array, Array]:
    """x (N, H, W, C) -> y (N, OH, OW, C), winner uint8."""
    x = dense(x)
    images, height, width, channels = x.shape
    out_height, out_width = windows(height, size, stride), windows(width, size, stride)
    y = empty((images, out_height, out_width, channels), x.dtype)
    winner = empty(y.shape, "uint8")
    arguments = (x, y, winner, y.size, height, width, channels, out_height, out_width, size, stride)
    launch("maxpool_forward", blocks(y.size), arguments, dtype=x.dtype)
    return y, winner


def maxpool_backward(dy: Array, winner: Array, *, height: int, width: int, size: int, stride: int) -> Array:
    """dx (N, height, width, C) like dy."""
    dy = dense(dy)
    images, out_height, out_width, channels = dy.shape
    for name, array in (("dy", dy), ("winner", winner)):
        require_shape(name, array, (images, windows(height, size, stride), windows(width, size, stride), channels))
    dx = empty((images, height, width, channels), dy.dtype)
    arguments = (dy, dense(winner), dx, dx.size, height, width, channels, out_height, out_width, size, stride)
    launch("maxpool_backward", blocks(dx.size), arguments, dtype=dy.dtype)
    return dx


def dropout_forward(x: Array, *, keep: float, scale: float, key: Key, first: Any = 0) -> Array:
    """y = x * mask * scale; the mask is a function of the key and the element's place in the batch."""
    x = dense(x)
    y = empty(x.shape, x.dtype)
    seed, step, layer = key
    words, number = 0, step
    if hasattr(step, "dtype"):
        words, number = step.dtype.itemsize // 4, 0
    arguments = (
        *(x, y, x.size, math.floor(keep * 2**32), scale, layer, seed, number),
        *(step if words else None, words),
        *((0, first) if hasattr(first, "dtype") else (first, None)),
        math.prod(x.shape[1:]),
    )
    # Up to three elements of the first thread belong to the row before.
    launch("dropout", blocks(x.size + 3, 4) if x.size else (0,), arguments, dtype=x.dtype)
    return y


def dropout_backward(dy: Array, *, keep: float, scale: float, key: Key, first: Any = 0) -> Array:
    """dx = dy * mask * scale: the same function."""
    return dropout_forward(dy, keep=keep, scale=scale, key=key, first=first)


def softmax(z: Array) -> Array:
    """z (N, classes) -> p, float32."""
    z = floats(z)
    p = empty(z.shape, "float32")
    launch("softmax", (z.shape[0],), (z, p, z.shape[1]), dtype="float32", shared=THREADS // 32 * 4)
    return p


def cross_entropy(z: Array, labels: Array) -> tuple[Array, Array]:
    """z (N, classes), labels int32 (N,) -> loss (N,), dz (N, classes), float32."""
    z = floats(z)
    require_shape("labels", labels, z.shape[:1])
    loss, dz = empty((z.shape[0],), "float32"), empty(z.shape, "float32")
    arguments = (z, dense(labels), loss, dz, z.shape[1])
    launch("cross_entropy", (z.shape[0],), arguments, dtype="float32", shared=THREADS // 32 * 4)
    return loss, dz


def sgd_update(w: Array, v: Array, dw: Array, *, lr: Any, momentum: float, decay: float) -> None:
    """v <- momentum v - decay lr w - lr dw; w <- w + v. ``lr`` is a number or an array of one on the device."""
    require_shape("v", v, w.shape)
    require_shape("dw", dw, w.shape)
    rate = lr if hasattr(lr, "dtype") and not isinstance(lr, np.generic) else None
    dw = floats(dw)
    arguments = (w, v, dw, w.size, 0.0 if rate is not None else float(lr), rate, momentum, decay)
    beside.run(lambda: launch("sgd_update", blocks(w.size, 4), arguments, dtype="float32"), dw)
