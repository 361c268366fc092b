"""Two-dimensional convolution, alone and together with what follows it.

The formulas are in ``net/reference/convolution.py``. This file joins the parts: ``plan.py`` says which algorithm;
``winograd.py``, ``winograd_gradient.py`` and ``im2col.py`` are the algorithms; ``finish.py`` is bias, ReLU, LRN and
pool.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from net.cpu import im2col, plan, winograd, winograd_gradient
from net.cpu.finish import NOTHING, Finish, Results, block, finish_all, finish_image, results, unfinish
from net.cpu.fixed import filters
from net.cpu.jit import kernel, prange
from net.cpu.memory import contiguous, empty
from net.shapes import require_shape, windows

Lrn = tuple[int, float, float, float] | None
Pool = tuple[int, int] | None


def conv2d_forward(x: np.ndarray, w: np.ndarray, b: np.ndarray, *, stride: int, pad: int, groups: int) -> np.ndarray:
    """x (N, H, W, Cin), w (KH, KW, Cin/groups, Cout), b (Cout,) -> y (N, OH, OW, Cout); keep x."""
    return _forward(contiguous(x), contiguous(w), contiguous(b), stride, pad, groups, NOTHING, keep=True).y


def conv2d_backward(
    dy: np.ndarray, x: np.ndarray, w: np.ndarray, *, stride: int, pad: int, groups: int, need_dx: bool = True
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """dy (N, OH, OW, Cout) -> dx like x or None, dw like w, db (Cout,)."""
    dy, x, w = contiguous(dy), contiguous(x), contiguous(w)
    db = empty(w.shape[3])
    np.sum(dy.reshape(-1, w.shape[3]), axis=0, out=db)
    return *_backward(dy, x, w, stride, pad, groups, need_dx), db


def conv_block_forward(
    x: np.ndarray,
    w: np.ndarray,
    b: np.ndarray,
    *,
    stride: int,
    pad: int,
    groups: int,
    lrn: Lrn,
    pool: Pool,
    training: bool,
) -> tuple[np.ndarray, Any]:
    """Convolution, bias, ReLU, [LRN], [max pool] -> the block's output, and what its backward pass needs."""
    x, finish = contiguous(x), block(lrn, pool)
    got = _forward(x, contiguous(w), contiguous(b), stride, pad, groups, finish, keep=training)
    y = got.y if finish.in_place else got.out
    return y, (x, got.y, got.winner) if training else None


def conv_block_backward(
    dy: np.ndarray,
    kept: Any,
    w: np.ndarray,
    *,
    stride: int,
    pad: int,
    groups: int,
    lrn: Lrn,
    pool: Pool,
    need_dx: bool,
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """dy of the block's output -> dx or None, dw, db. ``kept`` is used up: d(conv) is written over what it holds."""
    x, y, winner = kept
    finish, dy = block(lrn, pool), contiguous(dy)
    require_shape("dy", dy, winner.shape if finish.size else y.shape)
    d, db = unfinish(dy, y, winner, finish)
    return *_backward(d, x, contiguous(w), stride, pad, groups, need_dx), db


def _forward(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: int, pad: int, groups: int, finish: Finish, keep: bool
) -> Results:
    outputs = _outputs(x, w, stride, pad, groups)
    require_shape("b", b, (w.shape[3],))
    if plan.forward(w.shape, stride, groups) == "winograd":
        to = results(outputs, finish, keep)
        s = winograd.shape(x.shape, w.shape, stride, pad, groups, *outputs[1:3])
        _convolve(x, filters(w, s), b, s, finish, to)
        return to
    to = results(outputs, finish, keep=True)
    im2col.forward(x, np.asarray(w), to.y, stride, pad, groups)
    finish_all(to.y, b, finish, to, numba.get_num_threads())
    return to


def _backward(
    dy: np.ndarray, x: np.ndarray, w: np.ndarray, stride: int, pad: int, groups: int, need_dx: bool
) -> tuple[np.ndarray | None, np.ndarray]:
    require_shape("dy", dy, _outputs(x, w, stride, pad, groups))
    dw = empty(w.shape)
    if plan.backward_weights(w.shape, stride, groups) == "winograd":
        # A product here is of many mosaics, so that they may be small.
        s = winograd.shape(x.shape, w.shape, stride, pad, groups, *dy.shape[1:3], least=1)
        winograd_gradient.gradient(dy, x, dw, s)
    else:
        im2col.backward_weights(dy, x, dw, stride, pad, groups)
    if not need_dx:
        return None, dw
    if plan.backward_input(w.shape, stride, pad, groups) == "winograd":
        # dx is a convolution of dy; its padding makes the output as large as x.
        other, none = winograd.turned(w, groups), np.zeros(x.shape[3], np.float32)
        s = winograd.shape(dy.shape, other.shape, 1, w.shape[0] - 1 - pad, groups, *x.shape[1:3])
        to = results(x.shape, NOTHING, keep=True)
        _convolve(dy, winograd.filters(other, s), none, s, NOTHING, to)
        return to.y, dw
    dx = empty(x.shape)
    im2col.backward_input(dy, w, dx, stride, pad, groups)
    return dx, dw


def _convolve(x: np.ndarray, u: np.ndarray, b: np.ndarray, s: winograd.Shape, finish: Finish, to: Results) -> None:
    """Each core its own mosaics; a single picture is shared by all cores, if its maps fill whole panels."""
    work = winograd.workspace(s)
    pieces, shared = s.pieces, len(x) == 1 and s.maps == s.maps_padded
    _convolve_and_finish(x, u, b, s, work, finish, to, shared, pieces)
    if shared:
        whole = work.outputs[0].reshape(1, s.tile_rows * s.m, s.tile_columns * s.m, s.groups * s.maps)
        finish_all(whole, b, finish, to, 1)


@kernel
def _convolve_and_finish(
    x: np.ndarray,
    u: np.ndarray,
    b: np.ndarray,
    s: winograd.Shape,
    work: winograd.Workspace,
    finish: Finish,
    to: Results,
    shared: bool,
    pieces: int,
) -> None:
    """With ``shared``, of the only mosaic each task computes some pieces, and finishing is left to the caller."""
    together = s.mosaic_rows * s.mosaic_columns
    # Where no map is padded, the maps of all groups lie side by side and are finished in one go.
    groups, each = (1, s.groups * s.maps) if s.maps == s.maps_padded else (s.groups, s.maps_padded)
    tasks = work.canvas.shape[0]
    for number in prange(tasks):
        task = np.intp(number)
        begin, end, own, first_own = np.intp(0), np.intp(pieces), task, task * together
        if shared:
            begin, end = task * pieces // tasks, (task + 1) * pieces // tasks
            own, first_own = np.intp(0), np.intp(0)
        outputs = work.outputs[task].reshape(s.tile_rows * s.m, s.tile_columns * s.m, groups, each)
        for first in range(first_own, x.shape[0], tasks * together):
            winograd.convolve(x, first, u, s, work, task, work.outputs[own], begin, end)
            if shared:
                continue
            for image in range(min(together, x.shape[0] - first)):
                top = image // s.mosaic_columns * s.pitch_rows
                left = image % s.mosaic_columns * s.pitch_columns
                finish_image(outputs, top, left, b, finish, to, first + image, task)


def _outputs(x: np.ndarray, w: np.ndarray, stride: int, pad: int, groups: int) -> tuple[int, int, int, int]:
    """The shape of the convolution of x with w; a ValueError where they do not fit each other."""
    (n, height, width, channels), (kh, kw, depth, maps) = x.shape, w.shape
    if n == 0:
        raise ValueError("the batch is empty")
    if depth * groups != channels or maps % groups:
        raise ValueError(f"weights {w.shape} in {groups} groups do not fit a picture of {channels} channels")
    return n, windows(height, kh, stride, pad), windows(width, kw, stride, pad), maps
