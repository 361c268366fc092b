"""Fully connected layers: y = x w + b (paper, section 3.5). Results and gradients are float32 in every precision."""

from __future__ import annotations

from net.gpu import cublas
from net.gpu.arrays import empty, pictures
from net.gpu.convolution import add_bias, column_sum
from net.layers import Array
from net.shapes import require_shape


def linear_forward(x: Array, w: Array, b: Array) -> Array:
    """x (N, Cin), w (Cin, Cout), b (Cout,) -> y (N, Cout)."""
    y = multiply(*matrices(x, w))
    add_bias(y, b, rectify=False)
    return y


def linear_backward(dy: Array, x: Array, w: Array, *, need_dx: bool = True) -> tuple[Array | None, Array, Array]:
    """dy (N, Cout) -> dx (N, Cin) or None, dw (Cin, Cout), db (Cout,)."""
    x, w = matrices(x, w)
    require_shape("dy", dy, (x.shape[0], w.shape[1]))
    dy = pictures(dy)
    dx, dw = weight_and_input_gradient(dy, x, w, need_dx)
    return dx, dw, column_sum(dy)


def matrices(x: Array, w: Array) -> tuple[Array, Array]:
    """Both operands in the products' type."""
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"weights {w.shape} do not fit an input of shape {x.shape}")
    return pictures(x), pictures(w)


def multiply(x: Array, w: Array) -> Array:
    """x w, float32."""
    y = empty((x.shape[0], w.shape[1]), "float32")
    cublas.multiply(cublas.of(y), cublas.of(x), cublas.of(w))
    return y


def weight_and_input_gradient(dy: Array, x: Array, w: Array, need_dx: bool) -> tuple[Array | None, Array]:
    """dx = dy wᵀ (or None) and dw = xᵀ dy, float32; all operands of one type."""
    dw = empty(w.shape, "float32")
    cublas.multiply(cublas.of(dw), cublas.of(x).transposed, cublas.of(dy))
    if not need_dx:
        return None, dw
    dx = empty(x.shape, "float32")
    cublas.multiply(cublas.of(dx), cublas.of(dy), cublas.of(w).transposed)
    return dx, dw
