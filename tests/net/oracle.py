"""The operations once more, as nested loops over single numbers in float64, and a check of gradients.

Slow and plain on purpose: no slicing, no broadcasting, nothing shared with the code under test. Each function has the
name and the arguments of the operation it checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np

Array = np.ndarray


def relu_forward(x: Array) -> Array:
    y = x.astype(np.float64)
    for place in np.ndindex(x.shape):
        if x[place] < 0:
            y[place] = 0
    return y


def relu_backward(dy: Array, y: Array) -> Array:
    dx = np.zeros(dy.shape)
    for place in np.ndindex(dy.shape):
        if y[place] > 0:
            dx[place] = dy[place]
    return dx


def linear_forward(x: Array, w: Array, b: Array) -> Array:
    y = np.zeros((x.shape[0], w.shape[1]))
    for n, o in np.ndindex(y.shape):
        y[n, o] = float(b[o]) + sum(float(x[n, i]) * float(w[i, o]) for i in range(w.shape[0]))
    return y


def linear_backward(dy: Array, x: Array, w: Array, *, need_dx: bool) -> tuple[Array | None, Array, Array]:
    dx, dw, db = np.zeros(x.shape), np.zeros(w.shape), np.zeros(w.shape[1])
    for n, o in np.ndindex(dy.shape):
        db[o] += dy[n, o]
        for i in range(w.shape[0]):
            dx[n, i] += float(dy[n, o]) * float(w[i, o])
            dw[i, o] += float(dy[n, o]) * float(x[n, i])
    return (dx if need_dx else None), dw, db


def _taps(
    x: Array, w: Array, stride: int, pad: int, groups: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """All products of a convolution: place in y, in x, in w. Places in the padding are left out."""
    n, height, width, _ = x.shape
    kh, kw, per_group, maps = w.shape
    rows, columns = (height + 2 * pad - kh) // stride + 1, (width + 2 * pad - kw) // stride + 1
    for image, row, column, o, i, j, a in np.ndindex(n, rows, columns, maps, kh, kw, per_group):
        r, c = row * stride + i - pad, column * stride + j - pad
        if 0 <= r < height and 0 <= c < width:
            group = o // (maps // groups)
            yield (image, row, column, o), (image, r, c, group * per_group + a), (i, j, a, o)


def conv2d_forward(x: Array, w: Array, b: Array, *, stride: int, pad: int, groups: int) -> Array:
    n, height, width, _ = x.shape
    kh, kw, _, maps = w.shape
    y = np.zeros((n, (height + 2 * pad - kh) // stride + 1, (width + 2 * pad - kw) // stride + 1, maps))
    for place in np.ndindex(y.shape):
        y[place] = b[place[3]]
    for out, pixel, weight in _taps(x, w, stride, pad, groups):
        y[out] += float(x[pixel]) * float(w[weight])
    return y


def conv2d_backward(
    dy: Array, x: Array, w: Array, *, stride: int, pad: int, groups: int, need_dx: bool = True
) -> tuple[Array | None, Array, Array]:
    dx, dw, db = np.zeros(x.shape), np.zeros(w.shape), np.zeros(w.shape[3])
    for out, pixel, weight in _taps(x, w, stride, pad, groups):
        dx[pixel] += float(dy[out]) * float(w[weight])
        dw[weight] += float(dy[out]) * float(x[pixel])
    for place in np.ndindex(dy.shape):
        db[place[3]] += dy[place]
    return (dx if need_dx else None), dw, db


def _channels_around(place: tuple[int, ...], shape: tuple[int, ...], size: int) -> Iterator[tuple[int, ...]]:
    n, r, c, i = place
    for j in range(max(0, i - size // 2), min(shape[3] - 1, i + size // 2) + 1):
        yield n, r, c, j


def _pixels_around(place: tuple[int, ...], shape: tuple[int, ...], size: int) -> Iterator[tuple[int, ...]]:
    n, r, c, i = place
    h = size // 2
    for p, q in product(
        range(max(0, r - h), min(shape[1] - 1, r + h) + 1), range(max(0, c - h), min(shape[2] - 1, c + h) + 1)
    ):
        yield n, p, q, i


def _norm_forward(around: Callable, x: Array, size: int, k: float, alpha: float, beta: float) -> tuple[Array, Array]:
    y, s = np.zeros(x.shape), np.zeros(x.shape)
    for place in np.ndindex(x.shape):
        s[place] = k + alpha * sum(float(x[near]) ** 2 for near in around(place, x.shape, size))
        y[place] = float(x[place]) / s[place] ** beta
    return y, s


def _norm_backward(around: Callable, dy: Array, x: Array, s: Array, size: int, alpha: float, beta: float) -> Array:
    """Every entry ∂y[j]/∂x[i] of the Jacobian, by the quotient rule on y[j] = x[j] / s[j]^beta."""
    dx = np.zeros(x.shape)
    for j in np.ndindex(x.shape):
        power = float(s[j]) ** beta
        for i in around(j, x.shape, size):
            derivative_of_power = beta * float(s[j]) ** (beta - 1) * 2 * alpha * float(x[i])
            derivative = ((i == j) * power - float(x[j]) * derivative_of_power) / power**2
            dx[i] += float(dy[j]) * derivative
    return dx


def lrn_forward(x: Array, *, size: int, k: float, alpha: float, beta: float) -> tuple[Array, Array]:
    return _norm_forward(_channels_around, x, size, k, alpha, beta)


def lrn_backward(dy: Array, x: Array, s: Array, *, size: int, alpha: float, beta: float) -> Array:
    return _norm_backward(_channels_around, dy, x, s, size, alpha, beta)


def map_norm_forward(x: Array, *, size: int, k: float, alpha: float, beta: float) -> tuple[Array, Array]:
    return _norm_forward(_pixels_around, x, size, k, alpha, beta)


def map_norm_backward(dy: Array, x: Array, s: Array, *, size: int, alpha: float, beta: float) -> Array:
    return _norm_backward(_pixels_around, dy, x, s, size, alpha, beta)


def maxpool_forward(x: Array, *, size: int, stride: int) -> tuple[Array, Array]:
    n, height, width, channels = x.shape
    y = np.zeros((n, (height - size) // stride + 1, (width - size) // stride + 1, channels))
    winner = np.zeros(y.shape, dtype=np.uint8)
    for image, r, c, a in np.ndindex(y.shape):
        best, place = x[image, r * stride, c * stride, a], 0
        for i, j in product(range(size), range(size)):
            value = x[image, r * stride + i, c * stride + j, a]
            if value > best or (math.isnan(value) and not math.isnan(best)):
                best, place = value, i * size + j
        y[image, r, c, a], winner[image, r, c, a] = best, place
    return y, winner


def maxpool_backward(dy: Array, winner: Array, *, height: int, width: int, size: int, stride: int) -> Array:
    dx = np.zeros((dy.shape[0], height, width, dy.shape[3]))
    for n, r, c, a in np.ndindex(dy.shape):
        i, j = divmod(int(winner[n, r, c, a]), size)
        dx[n, r * stride + i, c * stride + j, a] += dy[n, r, c, a]
    return dx


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0], c[1], c[2], c[3]


def dropout_forward(x: Array, *, keep: float, scale: float, key: tuple[Any, Any, Any], first: Any = 0) -> Array:
    seed, step, layer = (int(np.asarray(part).item()) for part in key)
    y = np.zeros(x.shape)
    start = int(np.asarray(first).item()) * math.prod(x.shape[1:])
    for e, place in enumerate(np.ndindex(x.shape), start):
        counter = (e // 4, layer, step % 2**32, step // 2**32)
        word = philox4x32(counter, (seed % 2**32, seed // 2**32))[e % 4]
        if word < int(keep * 2**32):
            y[place] = float(x[place]) * scale
    return y


dropout_backward = dropout_forward


def softmax(z: Array) -> Array:
    p = np.zeros(z.shape)
    for n in range(len(z)):
        top = max(float(v) for v in z[n])
        total = sum(math.exp(float(v) - top) for v in z[n])
        for c in range(z.shape[1]):
            p[n, c] = math.exp(float(z[n, c]) - top) / total
    return p


def cross_entropy(z: Array, labels: Array) -> tuple[Array, Array]:
    loss, dz = np.zeros(len(z)), softmax(z)
    for n, label in enumerate(labels):
        top = max(float(v) for v in z[n])
        loss[n] = math.log(sum(math.exp(float(v) - top) for v in z[n])) + top - float(z[n, label])
        dz[n, label] -= 1
    return loss, dz / len(z)


def sgd_update(w: Array, v: Array, dw: Array, *, lr: Any, momentum: float, decay: float) -> tuple[Array, Array]:
    """The new w and v."""
    rate = float(np.asarray(lr).item())
    new_w, new_v = np.zeros(w.shape), np.zeros(w.shape)
    for i in np.ndindex(w.shape):
        new_v[i] = momentum * float(v[i]) - decay * rate * float(w[i]) - rate * float(dw[i])
        new_w[i] = float(w[i]) + new_v[i]
    return new_w, new_v


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
    n, height, width, _ = images.shape
    before, after = border
    y = np.zeros((n, before + height + after, before + width + after, 3))
    for image, r, c, ch in np.ndindex(n, height, width, 3):
        source = width - 1 - c if flip[image] else c
        if mean is None:
            m = 0.0
        elif len(mean) == height:
            m = float(mean[r, c, ch])
        else:
            m = float(mean[corner[image, 0] + r, corner[image, 1] + source, ch])
        value = ((float(images[image, r, source, ch]) - m) + float(shift[image, ch])) * scale
        y[image, before + r, before + c, 2 - ch if bgr else ch] = value
    return y


def directional_error(
    function: Callable[..., Array],
    arguments: tuple[Array, ...],
    gradients: tuple[Array, ...],
    dy: Array,
    random: np.random.Generator,
    *,
    step: float = 1e-5,
    directions: int = 4,
) -> float:
    """Largest relative difference between analytic and numeric derivatives along random directions.

    ``function(*arguments)`` is y; ``gradients[i]`` is said to be the gradient of ``sum(dy * y)`` with respect to
    ``arguments[i]``. For a direction u the analytic derivative is ``sum(gradient * u)``, the numeric one the central
    difference of ``sum(dy * y)`` over ``argument ± step u``. All in float64. The difference is given relative to
    ``|gradient * u|``, the size such a sum of random signs usually has, so that a sum that happens to cancel does not
    matter. NaN comes back as infinity.
    """
    assert all(a.dtype == np.float64 for a in (*arguments, *gradients, dy))
    worst = 0.0
    for i, (argument, gradient) in enumerate(zip(arguments, gradients, strict=True)):
        assert gradient.shape == argument.shape
        for _ in range(directions):
            u = random.standard_normal(argument.shape)

            def loss(offset: float, i: int = i, u: Array = u) -> float:
                moved = (*arguments[:i], arguments[i] + offset * u, *arguments[i + 1 :])
                return float((dy * function(*moved)).sum())

            numeric = (loss(step) - loss(-step)) / (2 * step)
            analytic = float((gradient * u).sum())
            size = float(np.linalg.norm(gradient * u))
            error = abs(numeric - analytic) / size if size > 0 else abs(numeric - analytic)
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
