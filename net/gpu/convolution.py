"""Convolution as a matrix product (paper, section 3.5): y = columns(x) w, group by group.

``columns`` lays out, for every output pixel, the values its window covers as one row (``columns.cu``), and cuBLAS
multiplies by the weights, which are a matrix (KH*KW*Cin/groups, Cout) as they lie in memory. Backward:

    dw = columns(x)ᵀ dy          db = sum of dy over all pixels          dx = gather(dy wᵀ)

Groups are a batch of products whose operands lie a fixed distance apart, so no array is split or copied for them.
``shape.py`` bounds the memory of one layer's columns: larger batches go through in pieces.

In bfloat16 most layers take kernels that need no columns in memory instead (``implicit.py``).
"""

from __future__ import annotations

from dataclasses import replace

from net.gpu import cublas, implicit
from net.gpu.arrays import blocks, dense, empty, floats, pictures
from net.gpu.device import current
from net.gpu.kernels import THREADS, launch
from net.gpu.shape import ConvShape, shape_of
from net.layers import Array
from net.shapes import require_shape


def conv2d_forward(x: Array, w: Array, b: Array, *, stride: int, pad: int, groups: int) -> Array:
    """x (N, H, W, Cin), w (KH, KW, Cin/groups, Cout), b (Cout,) -> y (N, OH, OW, Cout)."""
    shape = shape_of(x, w, stride, pad, groups)
    y, _ = product(*operands(x, w, shape), shape, keep_columns=False)
    add_bias(y, b, rectify=False)
    return y


def conv2d_backward(
    dy: Array, x: Array, w: Array, *, stride: int, pad: int, groups: int, need_dx: bool = True
) -> tuple[Array | None, Array, Array]:
    """dy (N, OH, OW, Cout) -> dx (N, H, W, Cin) or None, dw like w, db (Cout,)."""
    shape = shape_of(x, w, stride, pad, groups)
    require_shape("dy", dy, (shape.images, shape.out_height, shape.out_width, shape.maps))
    dy = pictures(dy)
    x, matrix = operands(x, w, shape)
    dw = weight_gradient(dy, x, None, shape)
    dx = input_gradient(dy, w, matrix, shape) if need_dx else None
    return dx, dw, column_sum(dy)


def operands(x: Array, w: Array, shape: ConvShape) -> tuple[Array, Array]:
    """The picture and the matrix of weights as the products take them."""
    x = pictures(x)
    if implicit.suits(shape) and shape.stride > 1:
        return implicit.fold(x, shape), implicit.fold_weights(floats(w), shape)
    return x, packed(w, shape)


def packed(w: Array, shape: ConvShape) -> Array:
    """The weights as a matrix (padded, maps) in the products' type; the filling is zero."""
    w = dense(w).reshape(shape.depth, shape.maps)
    storage = current().storage
    if shape.padded == shape.depth and storage == "float32":
        return w
    matrix = empty((shape.padded, shape.maps), storage)
    launch("cast_from_float", blocks(matrix.size, 4), (w, matrix, w.size, matrix.size), dtype=storage)
    return matrix


def product(x: Array, w: Array, shape: ConvShape, *, keep_columns: bool) -> tuple[Array, Array | None]:
    """The convolution without bias, and the columns where there are any, are to be kept, and fit in one piece."""
    if implicit.suits(shape):
        return implicit.forward(x, w, shape), None
    return columns_product(x, w, shape, keep_columns=keep_columns)


def columns_product(x: Array, w: Array, shape: ConvShape, *, keep_columns: bool) -> tuple[Array, Array | None]:
    """The same by way of the columns, whatever the shape; ``w`` as :func:`packed` gives it."""
    y = empty((shape.images, shape.out_height, shape.out_width, shape.maps), x.dtype)
    piece = images_at_once(shape)
    each = shape.maps // shape.groups
    for first in range(0, shape.images, piece):
        count = min(piece, shape.images - first)
        made = columns(x[first : first + count], shape)
        rows = count * shape.pixels
        cublas.multiply(
            _grouped(y[first : first + count], rows, each, shape.maps),
            _grouped(made, rows, shape.padded, shape.row),
            _grouped(w, shape.padded, each, shape.maps),
            batch=shape.groups,
        )
    return y, made if keep_columns and piece == shape.images else None


def rectified(x: Array, w: Array, b: Array, shape: ConvShape, *, keep_columns: bool) -> tuple[Array, Array | None]:
    """relu(convolution + b), and the columns as :func:`product` returns them."""
    if implicit.suits(shape):
        return implicit.forward(x, w, shape, floats(b), rectify=True), None
    y, columns = product(x, w, shape, keep_columns=keep_columns)
    add_bias(y, b, rectify=True)
    return y, columns


def weight_gradient(dy: Array, x: Array, kept: Array | None, shape: ConvShape) -> Array:
    """dw, float32 like w; x as :func:`operands` gives it, ``kept`` the columns if they were kept."""
    if implicit.suits(shape):
        return implicit.weight_gradient(dy, x, shape)
    return columns_weight_gradient(dy, x, kept, shape)


def columns_weight_gradient(dy: Array, x: Array, kept: Array | None, shape: ConvShape) -> Array:
    """dw = columns(x)ᵀ dy; x as it is, ``kept`` the columns if they were kept."""
    dw = empty((shape.padded, shape.maps), "float32")
    piece = images_at_once(shape)
    each = shape.maps // shape.groups
    for first in range(0, shape.images, piece):
        count = min(piece, shape.images - first)
        made = columns(x[first : first + count], shape) if kept is None else kept
        rows = count * shape.pixels
        left = _grouped(made, rows, shape.padded, shape.row)
        right = _grouped(dy[first : first + count], rows, each, shape.maps)
        out = _grouped(dw, shape.padded, each, shape.maps)
        # One call a group: these are long sums into small matrices, which cuBLAS has to split to fill the device.
        for group in range(shape.groups):
            cublas.multiply(_member(out, group), _member(left, group).transposed, _member(right, group), add=first > 0)
    return dw[: shape.depth].reshape(shape.kernel_h, shape.kernel_w, shape.channels // shape.groups, shape.maps)


def input_gradient(dy: Array, w: Array, matrix: Array, shape: ConvShape) -> Array:
    """dx, of dy's type; ``matrix`` are the weights as :func:`operands` gives them."""
    if implicit.suits(shape) and shape.stride == 1:
        return implicit.input_gradient(dy, matrix, shape)
    return columns_input_gradient(dy, packed(w, shape) if implicit.suits(shape) else matrix, shape)


def columns_input_gradient(dy: Array, matrix: Array, shape: ConvShape) -> Array:
    """dx = gather(dy wᵀ); ``matrix`` as :func:`packed` gives it."""
    dx = empty((shape.images, shape.height, shape.width, shape.channels), dy.dtype)
    piece = images_at_once(shape)
    each = shape.maps // shape.groups
    wide = shape.channels // shape.groups % _wide(dy) == 0
    vectors = shape.channels // _wide(dy) if wide else shape.channels
    stretches, across = spread(vectors)
    for first in range(0, shape.images, piece):
        count = min(piece, shape.images - first)
        rows = count * shape.pixels
        dcolumns = empty((rows, shape.row), dy.dtype)
        cublas.multiply(
            _grouped(dcolumns, rows, shape.padded, shape.row),
            _grouped(dy[first : first + count], rows, each, shape.maps),
            _grouped(matrix, shape.padded, each, shape.maps).transposed,
            batch=shape.groups,
        )
        launch(
            "gather_wide" if wide else "gather_any",
            (count * shape.height, stretches),
            (
                *(dcolumns, dx[first : first + count], shape.height, shape.width, shape.channels),
                *(shape.kernel_h, shape.kernel_w, shape.stride, shape.pad, shape.out_height, shape.out_width),
                *(shape.groups, shape.padded, across),
            ),
            dtype=dy.dtype,
        )
    return dx


def columns(x: Array, shape: ConvShape) -> Array:
    """Rows of window values (images * OH * OW, groups * padded), of x's type."""
    images = x.shape[0]
    made = empty((images * shape.pixels, shape.row), x.dtype)
    wide = shape.channels // shape.groups % _wide(x) == 0
    stretches, across = spread(shape.row // _wide(x))
    launch(
        "columns_wide" if wide else "columns_any",
        (images * shape.out_height, stretches),
        (
            *(x, made, shape.height, shape.width, shape.channels, shape.kernel_w, shape.stride, shape.pad),
            *(shape.out_height, shape.out_width, shape.groups, shape.depth, shape.padded, across),
        ),
        dtype=x.dtype,
    )
    return made


def images_at_once(shape: ConvShape) -> int:
    """How many images' columns are made at a time on the current device."""
    return shape.images_at_once(current().memory, 2 if current().precision == "bf16" else 4)


def spread(vectors: int) -> tuple[int, int]:
    """How a row of ``vectors`` is dealt out: number of stretches, and threads side by side in a stretch.

    A block has THREADS threads; those that make no whole further set of ``across`` idle, so the split is the one
    that leaves the fewest idle.
    """

    def busy(stretches: int) -> float:
        across = -(-vectors // stretches)
        return vectors * (THREADS // across) / (stretches * THREADS)

    fewest = -(-vectors // THREADS)
    stretches = max(range(fewest, min(fewest + 8, vectors) + 1), key=busy)
    return stretches, -(-vectors // stretches)


def add_bias(y: Array, b: Array, *, rectify: bool) -> None:
    """y += b over the last axis, in place, and a ReLU where ``rectify``.

    Not cuBLAS's own epilogue: what its ReLU does with NaN is not documented, and here a NaN must come through.
    """
    channels = y.shape[-1]
    require_shape("b", b, (channels,))
    each = 4 if channels % 4 == 0 else 1
    launch(f"bias_{each}", blocks(y.size, each), (y, floats(b), y, y.size, channels, rectify), dtype=y.dtype)


def column_sum(x: Array) -> Array:
    """Sum over all axes but the last, float32, in a fixed order."""
    channels = x.shape[-1]
    rows = x.size // channels
    parts = max(1, min(512, rows // 64))
    partial = empty((parts, channels), "float32")
    launch(
        "column_sum",
        (-(-channels // 32), parts),
        (x, partial, rows, channels, -(-rows // parts)),
        dtype=x.dtype,
        shared=THREADS * 4,
    )
    return sum_parts(partial)


def sum_parts(partial: Array) -> Array:
    """(parts, channels) -> (channels,), float32."""
    parts, channels = partial.shape
    total = empty((channels,), "float32")
    arguments = (partial, total, parts, channels)
    launch("column_sum_last", (-(-channels // 32),), arguments, dtype="float32", shared=THREADS * 4)
    return total


def _wide(x: Array) -> int:
    return 16 // x.dtype.itemsize


def _grouped(a: Array, rows: int, columns: int, width: int) -> cublas.Matrix:
    """``rows`` rows of ``width`` elements, of which each group has its own ``columns``."""
    return cublas.Matrix(int(a.data.ptr), rows, columns, width, a.dtype.name, step=columns)


def _member(batch: cublas.Matrix, group: int) -> cublas.Matrix:
    itemsize = 2 if batch.dtype == "uint16" else 4
    return replace(batch, address=batch.address + group * batch.step * itemsize, step=0)
