"""Convolution with fewer multiplications: Winograd's tiles.

What is computed is the convolution of ``net/reference/convolution.py``. A tile of m x m outputs of an r x r filter is
computed from n x n inputs, n = m + r - 1, through the small matrices of ``cook_toom.py``::

    y = Aᵀ [ sum_a (G w_a Gᵀ) * (B d_a Bᵀ) ] A                     a: input channels, *: element by element

The sum over the channels at each of the n² places is what takes the time, and it is a matrix product: tiles times
channels, times channels times maps. For 3x3 filters and 4x4 tiles these products have 36 multiplications where the
convolution itself has 144; for 5x5 filters and 3x3 tiles 49 instead of 225.

Backward
    dx is a convolution of dy with the filters turned by 180 degrees and with inputs and maps exchanged: the same code.
    dw is the derivative of the formula above with respect to w, which is the same three steps the other way round::

        dw_a = Gᵀ [ sum_tiles (A dy Aᵀ) * (B d_a Bᵀ) ] G

How the work is laid out
    - **Canvas.** The input of a few images is copied into a zero-padded field first, so that no later step knows of
      borders. Several images share one field, a *mosaic*, with common gutters of zeros: 13 x 13 outputs need 4 x 4
      tiles of 4 an image, but only 7 x 7 for four images together, 23% fewer.
    - **Stride.** A filter with stride s is a filter with stride 1 over the s² interleaved pictures of every s-th pixel:
      the canvas is filled that way. conv1, 11x11x3 with stride 4, becomes 3x3x48: 2.25 x 48 multiplications an output
      instead of 363.
    - **One core, one mosaic.** Canvas, transformed tiles, products and outputs of a mosaic stay in the core's cache
      from beginning to end; memory sees the input once and the output once.
    - dw sums over all tiles of the batch, in the same order of additions with any number of threads. Where the sums
      are small (conv1, conv2) the batch is dealt out to 16 parts; a core goes through a part's mosaics with tiles and
      sums in its cache, and the parts are added at the end. Where they are large, a slab of images is transformed
      first, each core taking some of the mosaics, and then multiplied, each core taking some of the n² places.

Layouts (flat arrays)
    canvas    [row][column][group][channel]       channels padded to full vectors
    tiles     [place][tile][channel]              transformed inputs: rows of a product, left operand
    products  [place][panel][tile][PANEL maps]    transformed outputs: panels of a product, result or right operand
    filters   [place][group][panel][channel][PANEL maps]
Places are a cache line more than a whole number of pages apart, so that the n² values of one tile do not fall on the
same lines of the cache.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numba
import numpy as np
from numba import prange

from net.cpu.jit import inner, kernel
from net.cpu.memory import empty
from net.cpu.product import add_columns_times_panel, rows_times_half_panel, rows_times_panel
from net.cpu.simd import BLOCK, LANES, PANEL, copy, fence, stream, transform

_SHIFT: Final = 16  # floats in a cache line: the distance that places are put further apart
_SLAB: Final = 24 << 20  # bytes of transformed tiles in the gradient of the weights
_SUMS: Final = 5 << 18  # bytes of a group's sums over tiles that a core may keep beside its tiles
_BESIDE: Final = 1 << 20  # bytes of those tiles
_PARTS: Final = 16  # partial sums of such a gradient, whatever the number of threads
_NEAR: Final = 352 << 10  # bytes of transformed tiles that stay in a second-level cache, beside the rest
_TILES: Final = 64  # tiles of a mosaic at least, where the batch has them and a product is of one mosaic


class Shape(NamedTuple):
    """Everything a kernel must know about the geometry of one convolution, forward form."""

    m: int  # outputs of a tile, in each direction
    n: int  # inputs of a tile
    stride: int
    pad: int
    height: int  # of the input
    width: int
    out_height: int
    out_width: int
    groups: int
    channels: int  # a group, as stored
    depth: int  # a group, on the canvas: channels times stride²
    depth_padded: int  # in full vectors
    maps: int  # a group
    maps_padded: int  # in full panels
    mosaic_rows: int  # images of a mosaic, below each other
    mosaic_columns: int  # and side by side
    pitch_rows: int  # from one image's outputs to the next one's
    pitch_columns: int
    tile_rows: int  # of a mosaic
    tile_columns: int
    block: int  # tiles that go through all steps together
    strip: int  # panels of maps whose products exist at a time

    @property
    def images(self) -> int:
        return self.mosaic_rows * self.mosaic_columns

    @property
    def tiles(self) -> int:
        return self.tile_rows * self.tile_columns

    @property
    def pieces(self) -> int:
        """What a mosaic's work can be divided into: blocks of tiles times groups times panels of maps."""
        return -(-self.tiles // self.block) * self.groups * (self.maps_padded // PANEL)

    @property
    def canvas_size(self) -> int:
        reach = self.n - self.m
        rows, columns = self.tile_rows * self.m + reach, self.tile_columns * self.m + reach
        return rows * columns * self.groups * self.depth_padded

    @property
    def output_size(self) -> int:
        return self.tiles * self.m**2 * self.groups * self.maps_padded


def applies(kernel_height: int, kernel_width: int, stride: int, groups: int) -> bool:
    """Whether there are transforms for such filters."""
    return kernel_height == kernel_width and _taps(kernel_height, stride) in _TILE and (stride == 1 or groups == 1)


def shape(
    x: tuple[int, ...],
    w: tuple[int, ...],
    stride: int,
    pad: int,
    groups: int,
    out_height: int,
    out_width: int,
    least: int = _TILES,
) -> Shape:
    """The geometry for inputs of shape x (N, H, W, C) and filters of shape w (KH, KW, C / groups, maps).

    A mosaic has at least ``least`` tiles, if the batch has.
    """
    images, height, width, _ = x
    taps = _taps(w[0], stride)
    m = _TILE[taps]
    depth = w[2] * stride**2
    pitch_rows, pitch_columns = -(-(height + pad) // stride), -(-(width + pad) // stride)

    def tiles(images: int, pitch: int, outputs: int) -> int:
        return -(-((images - 1) * pitch + outputs) // m)

    def cost(grid: tuple[int, int]) -> tuple[float, int]:
        """Tiles an image; and among equals the smallest mosaic that still makes long products."""
        total = tiles(grid[0], pitch_rows, out_height) * tiles(grid[1], pitch_columns, out_width)
        count = grid[0] * grid[1]
        return total * -(-images // count) / images * (1.05 if total < least else 1.0), count

    rows, columns = min(((a, b) for a in (1, 2, 4) for b in (1, 2, 4) if a * b <= max(images, 1)), key=cost)
    tile_rows, tile_columns = tiles(rows, pitch_rows, out_height), tiles(columns, pitch_columns, out_width)
    depth_padded, maps_padded = _up(depth, LANES), _up(w[3] // groups, PANEL)
    block, strip = tile_rows * tile_columns, maps_padded // PANEL
    fitting = _NEAR // (4 * (m + taps - 1) ** 2 * depth_padded)
    if fitting >= 4 * BLOCK:
        # Few channels: the transformed tiles stay in the second-level cache while one panel after another uses them.
        pieces = -(-block // fitting)
        block, strip = min(block, _up(-(-block // pieces), BLOCK)), 1
    return Shape(
        m=m,
        n=m + taps - 1,
        stride=stride,
        pad=pad,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        groups=groups,
        channels=w[2],
        depth=depth,
        depth_padded=depth_padded,
        maps=w[3] // groups,
        maps_padded=maps_padded,
        mosaic_rows=rows,
        mosaic_columns=columns,
        pitch_rows=pitch_rows,
        pitch_columns=pitch_columns,
        tile_rows=tile_rows,
        tile_columns=tile_columns,
        block=block,
        strip=strip,
    )


def filters(w: np.ndarray, s: Shape) -> np.ndarray:
    """G w Gᵀ for filters (KH, KW, channels, groups x maps), in the layout of the products' right operand."""
    u = empty(s.n**2 * s.groups * s.depth * s.maps_padded)
    _filters(w, u, s)
    return u


def turned(w: np.ndarray, groups: int) -> np.ndarray:
    """The filters of dx: turned by 180 degrees, inputs and maps exchanged (within each group)."""
    kh, kw, channels, maps = w.shape
    grouped = w[::-1, ::-1].reshape(kh, kw, channels, groups, maps // groups)
    other = empty((kh, kw, maps // groups, groups * channels))
    np.copyto(other.reshape(kh, kw, maps // groups, groups, channels), grouped.transpose(0, 1, 4, 3, 2))
    return other


class Workspace(NamedTuple):
    """What it takes to convolve one mosaic; the first axis counts the tasks, one for each thread."""

    canvas: np.ndarray
    tiles: np.ndarray
    products: np.ndarray
    outputs: np.ndarray


def workspace(s: Shape) -> Workspace:
    threads = numba.get_num_threads()
    places = s.n**2
    canvas = empty((threads, s.canvas_size))
    canvas[...] = 0
    return Workspace(
        canvas=canvas,
        tiles=empty((threads, places * (s.block * s.depth_padded + _SHIFT))),
        products=empty((threads, places * (s.block * s.strip * PANEL + _SHIFT))),
        outputs=empty((threads, s.output_size)),
    )


@inner
def convolve(
    x: np.ndarray,
    first: int,
    u: np.ndarray,
    s: Shape,
    work: Workspace,
    task: int,
    outputs: np.ndarray,
    begin: int,
    end: int,
) -> None:
    """The mosaic of the images from ``first`` on, into ``outputs``, without bias.

    Of its ``Shape.pieces`` only those from ``begin`` to ``end``, so that cores can share a mosaic.
    """
    canvas, tiles, products = work.canvas[task], work.tiles[task], work.products[task]
    places, panels = s.n * s.n, s.maps_padded // PANEL
    tiles_step, products_step = s.block * s.depth_padded + _SHIFT, s.block * s.strip * PANEL + _SHIFT
    scratch = np.empty(8 * 8 * LANES, np.float32)
    fill_canvas(x, first, s, canvas)
    for first_tile in range(0, s.tile_rows * s.tile_columns, s.block):
        count = min(s.block, s.tile_rows * s.tile_columns - first_tile)
        for group in range(s.groups):
            piece = (first_tile // s.block * s.groups + group) * panels
            from_panel, to_panel = max(begin - piece, 0), min(end - piece, panels)
            if from_panel >= to_panel:
                continue
            _transform_inputs(
                canvas,
                group * s.depth_padded,
                s.depth_padded,
                first_tile,
                count,
                s,
                tiles,
                0,
                tiles_step,
                s.depth_padded,
                scratch,
            )
            for first_panel in range(from_panel, to_panel, s.strip):
                now = min(s.strip, to_panel - first_panel)
                whole = min(now, (s.maps + LANES - 1) // PANEL - first_panel)
                for place in range(places):
                    a_at = place * tiles_step
                    b_at = ((place * s.groups + group) * panels + first_panel) * s.depth * PANEL
                    c_at = place * products_step
                    for _ in range(whole):
                        rows_times_panel(tiles, a_at, s.depth_padded, u, b_at, products, c_at, PANEL, count, s.depth)
                        b_at += s.depth * PANEL
                        c_at += count * PANEL
                    if whole < now:
                        rows_times_half_panel(
                            tiles, a_at, s.depth_padded, u, b_at, products, c_at, PANEL, count, s.depth
                        )
                map_ = group * s.maps_padded + first_panel * PANEL
                _transform_outputs(products, products_step, first_tile, count, now, map_, s, outputs, scratch)


@inner
def fill_canvas(x: np.ndarray, first: int, s: Shape, canvas: np.ndarray) -> None:
    """Copy the images of a mosaic into a field of zeros; with a stride, its interleaved pictures side by side.

    The zeros around the images are there already. Images that the last mosaic lacks become zeros too.
    """
    columns = s.tile_columns * s.m + s.n - s.m
    rows = s.tile_rows * s.m + s.n - s.m
    pixel = s.groups * s.depth_padded
    run = s.stride * s.channels  # floats of one picture row that one pixel of the canvas takes, with a stride
    for image in range(s.mosaic_rows * s.mosaic_columns):
        top = image // s.mosaic_columns * s.pitch_rows
        left = image % s.mosaic_columns * s.pitch_columns
        there = first + image < x.shape[0]
        for p in range(s.height):
            row = top + (p + s.pad) // s.stride
            if row >= rows:
                break  # a ragged edge that no window covers
            source = x[min(first + image, x.shape[0] - 1), p].reshape(-1)
            if s.stride > 1:
                at = (row * columns + left) * pixel + (p + s.pad) % s.stride * run
                for column in range(min(columns - left, (s.pad + s.width + s.stride - 1) // s.stride)):
                    start, to = column * run - s.pad * s.channels, at + column * pixel
                    if there and start >= 0 and start + run <= source.size:
                        whole = run // 4 * 4
                        for i in range(0, whole, 4):
                            copy(4, source, start + i, canvas, to + i)
                        for i in range(whole, run):
                            canvas[to + i] = source[start + i]
                    else:
                        for i in range(max(0, -start), min(run, source.size - start)):
                            canvas[to + i] = source[start + i] if there else np.float32(0)
            elif not there or pixel == source.size // s.width:
                at = (row * columns + left + s.pad) * pixel
                for i in range(min(s.width, columns - left - s.pad) * pixel):
                    canvas[at + i] = source[i] if there else np.float32(0)
            else:
                for q in range(min(s.width, columns - left - s.pad)):
                    at = (row * columns + left + s.pad + q) * pixel
                    for group in range(s.groups):
                        for a in range(s.channels):
                            canvas[at + group * s.depth_padded + a] = source[(q * s.groups + group) * s.channels + a]


@inner
def _transform_inputs(
    canvas: np.ndarray,
    channel: int,
    depth: int,
    first: int,
    count: int,
    s: Shape,
    tiles: np.ndarray,
    tiles_at: int,
    tiles_step: int,
    tile_row: int,
    scratch: np.ndarray,
) -> None:
    """B d Bᵀ for ``count`` tiles of a mosaic from ``first`` on, and ``depth`` channels from ``channel`` on."""
    pixel = s.groups * s.depth_padded
    canvas_row = (s.tile_columns * s.m + s.n - s.m) * pixel
    for tile in range(count):
        row, column = (first + tile) // s.tile_columns, (first + tile) % s.tile_columns
        corner = row * s.m * canvas_row + column * s.m * pixel + channel
        for lane in range(0, depth, LANES):
            to = tiles_at + tile * tile_row + lane
            if s.n == 6:
                for j in range(6):
                    transform("input 4,3", canvas, corner + j * pixel + lane, canvas_row, scratch, j * LANES, 6 * LANES)
                for i in range(6):
                    transform("input 4,3", scratch, i * 6 * LANES, LANES, tiles, to + i * 6 * tiles_step, tiles_step)
            else:
                for j in range(7):
                    transform("input 3,5", canvas, corner + j * pixel + lane, canvas_row, scratch, j * LANES, 7 * LANES)
                for i in range(7):
                    transform("input 3,5", scratch, i * 7 * LANES, LANES, tiles, to + i * 7 * tiles_step, tiles_step)


@inner
def _transform_outputs(
    products: np.ndarray,
    products_step: int,
    first: int,
    count: int,
    panels: int,
    map_: int,
    s: Shape,
    outputs: np.ndarray,
    scratch: np.ndarray,
) -> None:
    """Aᵀ p A for ``count`` tiles of a mosaic from ``first`` on, and some panels of maps from ``map_`` on."""
    pixel = s.groups * s.maps_padded
    output_row = s.tile_columns * s.m * pixel
    for tile in range(count):
        row, column = (first + tile) // s.tile_columns, (first + tile) % s.tile_columns
        corner = row * s.m * output_row + column * s.m * pixel + map_
        for lane in range(0, min(panels * PANEL, s.maps - map_ % s.maps_padded), LANES):
            at = (lane // PANEL * count + tile) * PANEL + lane % PANEL
            to = corner + lane
            if s.n == 6:
                for j in range(6):
                    transform(
                        "output 4,3",
                        products,
                        at + j * products_step,
                        6 * products_step,
                        scratch,
                        j * LANES,
                        6 * LANES,
                    )
                for i in range(4):
                    transform("output 4,3", scratch, i * 6 * LANES, LANES, outputs, to + i * output_row, pixel)
            else:
                for j in range(7):
                    transform(
                        "output 3,5",
                        products,
                        at + j * products_step,
                        7 * products_step,
                        scratch,
                        j * LANES,
                        7 * LANES,
                    )
                for i in range(3):
                    transform("output 3,5", scratch, i * 7 * LANES, LANES, outputs, to + i * output_row, pixel)


def gradient(dy: np.ndarray, x: np.ndarray, dw: np.ndarray, s: Shape) -> None:
    """dw for the convolution of geometry ``s``: dy (N, OH, OW, groups x maps), x (N, H, W, groups x channels)."""
    near = 4 * s.n**2 * s.depth * s.maps_padded <= _SUMS
    du = _gradient_near(dy, x, s) if near else _gradient_in_slabs(dy, x, s)
    _weights(du, dw, s)


def _gradient_near(dy: np.ndarray, x: np.ndarray, s: Shape) -> np.ndarray:
    """The sums over all tiles at every place [place][group][channel][map], from partial sums of parts of the batch."""
    places = s.n**2
    threads = numba.get_num_threads()
    fitting = max(1, _BESIDE // (4 * places * (s.depth_padded + s.maps_padded)))
    block = -(-s.tiles // -(-s.tiles // fitting))
    du = empty((min(_PARTS, -(-len(x) // s.images)), places * s.groups * s.depth * s.maps_padded))
    tiles = empty((threads, places * (block * s.depth_padded + _SHIFT)))
    products = empty((threads, places * (block * s.maps_padded + _SHIFT)))
    outputs, canvas = empty((threads, s.output_size)), empty((threads, s.canvas_size))
    for zeros in (outputs, canvas):
        zeros[...] = 0
    _sum_parts(x, dy, s, block, canvas, outputs, tiles, products, du)
    _add_parts(du)
    return du[0]


def _gradient_in_slabs(dy: np.ndarray, x: np.ndarray, s: Shape) -> np.ndarray:
    """The same sums, from one slab of transformed images after another."""
    places = s.n**2
    mosaics = -(-len(x) // s.images)
    bytes_each = 4 * places * s.tiles * s.groups * (s.depth_padded + s.maps_padded)
    du = empty(places * s.groups * s.depth * s.maps_padded)
    slab = max(1, min(mosaics, _SLAB // bytes_each))
    count = slab * s.tiles
    tiles = empty(places * (count * s.groups * s.depth_padded + _SHIFT))
    products = empty(places * (count * s.groups * s.maps_padded + _SHIFT))
    threads = numba.get_num_threads()
    outputs, canvas = empty((threads, s.output_size)), empty((threads, s.canvas_size))
    for zeros in (outputs, canvas, du):
        zeros[...] = 0
    for start in range(0, mosaics, slab):
        now = min(slab, mosaics - start)
        _transform_both(x, dy, start * s.images, now, count, s, canvas, outputs, tiles, products)
        _multiply_all(tiles, products, du, now * s.tiles, count, s)
    return du


@kernel
def _sum_parts(
    x: np.ndarray,
    dy: np.ndarray,
    s: Shape,
    block: int,
    canvas: np.ndarray,
    outputs: np.ndarray,
    tiles: np.ndarray,
    products: np.ndarray,
    du: np.ndarray,
) -> None:
    """du[part] = tilesᵀ products at every place, over the mosaics of each part, ``block`` tiles at a time."""
    parts, tasks = du.shape[0], canvas.shape[0]
    images = s.mosaic_rows * s.mosaic_columns
    each = s.tile_rows * s.tile_columns
    panels, pieces = s.maps_padded // PANEL, (each + block - 1) // block
    tiles_step, products_step = block * s.depth_padded + _SHIFT, block * s.maps_padded + _SHIFT
    for task in prange(tasks):
        scratch = np.empty(8 * 8 * LANES, np.float32)
        for part in range(task, parts, tasks):
            sums = du[part]
            sums[:] = 0
            for first in range(part * images, x.shape[0], parts * images):
                fill_canvas(x, first, s, canvas[task])
                _fill_outputs(dy, first, s, outputs[task])
                for piece in range(s.groups * pieces):
                    group, start = piece // pieces, piece % pieces * block
                    count = min(block, each - start)
                    channel = group * s.depth_padded
                    _transform_inputs(
                        canvas[task],
                        channel,
                        s.depth_padded,
                        start,
                        count,
                        s,
                        tiles[task],
                        0,
                        tiles_step,
                        s.depth_padded,
                        scratch,
                    )
                    _transform_gradients(
                        outputs[task],
                        group * s.maps_padded,
                        s.maps_padded,
                        start,
                        count,
                        s,
                        products[task],
                        0,
                        products_step,
                        block,
                        scratch,
                    )
                    for place in range(s.n * s.n):
                        for panel in range(panels):
                            add_columns_times_panel(
                                tiles[task],
                                place * tiles_step,
                                s.depth_padded,
                                products[task],
                                place * products_step + panel * block * PANEL,
                                sums,
                                (place * s.groups + group) * s.depth * s.maps_padded + panel * PANEL,
                                s.maps_padded,
                                s.depth,
                                count,
                            )


@kernel
def _add_parts(du: np.ndarray) -> None:
    """du[0] += du[1] + ..., in this order, in runs of a fixed length."""
    parts, size = du.shape
    run = 1 << 12
    for task in prange((size + run - 1) // run):
        for part in range(1, parts):
            for i in range(task * run, min(size, (task + 1) * run)):
                du[0, i] += du[part, i]


@kernel
def _transform_both(
    x: np.ndarray,
    dy: np.ndarray,
    first: int,
    mosaics: int,
    count: int,
    s: Shape,
    canvas: np.ndarray,
    outputs: np.ndarray,
    tiles: np.ndarray,
    products: np.ndarray,
) -> None:
    """B d Bᵀ and A dy Aᵀ of some mosaics, side by side in arrays that have room for ``count`` tiles.

    A slab is too large for the caches and is read only when all of it is there: it is written past them.
    """
    each = s.tile_rows * s.tile_columns
    row = s.groups * s.depth_padded
    tiles_step = count * row + _SHIFT
    products_step = count * s.groups * s.maps_padded + _SHIFT
    tasks = canvas.shape[0]
    for task in prange(tasks):
        scratch, made = np.empty(8 * 8 * LANES, np.float32), np.empty(8 * 8 * LANES, np.float32)
        for mosaic in range(task, mosaics, tasks):
            image = first + mosaic * s.mosaic_rows * s.mosaic_columns
            fill_canvas(x, image, s, canvas[task])
            _fill_outputs(dy, image, s, outputs[task])
            for tile in range(each):
                at = mosaic * each + tile
                for lane in range(0, row, LANES):
                    _transform_inputs(canvas[task], lane, LANES, tile, 1, s, made, 0, LANES, LANES, scratch)
                    _stream_places(made, s, tiles, at * row + lane, tiles_step)
                for lane in range(0, s.groups * s.maps_padded, LANES):
                    _transform_gradients(outputs[task], lane, LANES, tile, 1, s, made, 0, LANES, 1, scratch)
                    to = (lane // PANEL * count + at) * PANEL + lane % PANEL
                    _stream_places(made, s, products, to, products_step)
        fence()


@inner
def _stream_places(made: np.ndarray, s: Shape, to: np.ndarray, to_at: int, to_step: int) -> None:
    """A vector of channels at every place to where places are ``to_step`` apart."""
    for place in range(s.n * s.n):
        stream(made, place * LANES, to, to_at + place * to_step)


@inner
def _fill_outputs(dy: np.ndarray, first: int, s: Shape, outputs: np.ndarray) -> None:
    """Copy dy of a mosaic's images to where its outputs lie in a field of zeros."""
    columns = s.tile_columns * s.m
    pixel = s.groups * s.maps_padded
    for image in range(s.mosaic_rows * s.mosaic_columns):
        top = image // s.mosaic_columns * s.pitch_rows
        left = image % s.mosaic_columns * s.pitch_columns
        there = first + image < dy.shape[0]
        for p in range(s.out_height):
            source = dy[min(first + image, dy.shape[0] - 1), p].reshape(-1)
            at = ((top + p) * columns + left) * pixel
            if not there or s.maps == s.maps_padded:
                for i in range(s.out_width * pixel):
                    outputs[at + i] = source[i] if there else np.float32(0)
            else:
                for q in range(s.out_width):
                    for group in range(s.groups):
                        for a in range(s.maps):
                            outputs[at + q * pixel + group * s.maps_padded + a] = source[
                                (q * s.groups + group) * s.maps + a
                            ]


@inner
def _transform_gradients(
    outputs: np.ndarray,
    map_: int,
    maps: int,
    first: int,
    count: int,
    s: Shape,
    products: np.ndarray,
    products_at: int,
    products_step: int,
    room: int,
    scratch: np.ndarray,
) -> None:
    """A dy Aᵀ for ``count`` tiles of a mosaic from ``first`` on, and ``maps`` maps from ``map_`` on.

    Panels have room for ``room`` tiles.
    """
    pixel = s.groups * s.maps_padded
    row = s.tile_columns * s.m * pixel
    for tile in range(count):
        place = first + tile
        corner = place // s.tile_columns * s.m * row + place % s.tile_columns * s.m * pixel + map_
        for lane in range(0, maps, LANES):
            to = products_at + (lane // PANEL * room + tile) * PANEL + lane % PANEL
            if s.n == 6:
                for j in range(4):
                    transform("gradient 4,3", outputs, corner + lane + j * pixel, row, scratch, j * LANES, 4 * LANES)
                for i in range(6):
                    transform(
                        "gradient 4,3",
                        scratch,
                        i * 4 * LANES,
                        LANES,
                        products,
                        to + i * 6 * products_step,
                        products_step,
                    )
            else:
                for j in range(3):
                    transform("gradient 3,5", outputs, corner + lane + j * pixel, row, scratch, j * LANES, 3 * LANES)
                for i in range(7):
                    transform(
                        "gradient 3,5",
                        scratch,
                        i * 3 * LANES,
                        LANES,
                        products,
                        to + i * 7 * products_step,
                        products_step,
                    )


@kernel
def _multiply_all(tiles: np.ndarray, products: np.ndarray, du: np.ndarray, used: int, count: int, s: Shape) -> None:
    """du += tilesᵀ products at every place, over the first ``used`` tiles."""
    panels = s.maps_padded // PANEL
    row = s.groups * s.depth_padded
    tiles_step = count * row + _SHIFT
    products_step = count * s.groups * s.maps_padded + _SHIFT
    for task in prange(s.n * s.n * s.groups):
        place, group = task // s.groups, task % s.groups
        for panel in range(panels):
            add_columns_times_panel(
                tiles,
                place * tiles_step + group * s.depth_padded,
                row,
                products,
                place * products_step + (group * panels + panel) * count * PANEL,
                du,
                task * s.depth * s.maps_padded + panel * PANEL,
                s.maps_padded,
                s.depth,
                used,
            )


@kernel
def _filters(w: np.ndarray, u: np.ndarray, s: Shape) -> None:
    panels = s.maps_padded // PANEL
    size, taps = w.shape[0], s.n - s.m + 1
    places_step = s.groups * panels * s.depth * PANEL
    for task in prange(s.groups * s.depth):
        group, a = task // s.depth, task % s.depth
        channel, phase = a % s.channels, a // s.channels
        row, column = phase // s.stride, phase % s.stride
        taken = np.zeros(taps * taps * PANEL, np.float32)
        half = np.zeros(s.n * taps * LANES, np.float64)
        for panel in range(panels):
            first = group * s.maps + panel * PANEL
            width = min(PANEL, s.maps - panel * PANEL)
            for tap in range(taps * taps):
                p, q = tap // taps * s.stride + row, tap % taps * s.stride + column
                inside = p < size and q < size
                for o in range(PANEL):
                    taken[tap * PANEL + o] = w[p, q, channel, first + o] if inside and o < width else np.float32(0)
            for lane in range(0, PANEL, LANES):
                to = ((group * panels + panel) * s.depth + a) * PANEL + lane
                if s.n == 6:
                    for j in range(3):
                        transform("filter 4,3", taken, j * PANEL + lane, 3 * PANEL, half, j * LANES, 3 * LANES)
                    for i in range(6):
                        transform("filter 4,3", half, i * 3 * LANES, LANES, u, to + i * 6 * places_step, places_step)
                else:
                    for j in range(5):
                        transform("filter 3,5", taken, j * PANEL + lane, 5 * PANEL, half, j * LANES, 5 * LANES)
                    for i in range(7):
                        transform("filter 3,5", half, i * 5 * LANES, LANES, u, to + i * 7 * places_step, places_step)


@kernel
def _weights(du: np.ndarray, dw: np.ndarray, s: Shape) -> None:
    """dw = Gᵀ du G, and back from interleaved pictures to the filter's own taps."""
    size, taps = dw.shape[0], s.n - s.m + 1
    places_step = s.groups * s.depth * s.maps_padded
    for task in prange(s.groups * s.depth):
        group, a = task // s.depth, task % s.depth
        channel, phase = a % s.channels, a // s.channels
        row, column = phase // s.stride, phase % s.stride
        half = np.zeros(s.n * taps * LANES, np.float64)
        total = np.zeros(taps * taps * LANES, np.float32)
        for lane in range(0, s.maps, LANES):
            at = (group * s.depth + a) * s.maps_padded + lane
            if s.n == 6:
                for j in range(6):
                    transform("weights 4,3", du, at + j * places_step, 6 * places_step, half, j * LANES, 6 * LANES)
                for i in range(3):
                    transform("weights 4,3", half, i * 6 * LANES, LANES, total, i * 3 * LANES, LANES)
            else:
                for j in range(7):
                    transform("weights 3,5", du, at + j * places_step, 7 * places_step, half, j * LANES, 7 * LANES)
                for i in range(5):
                    transform("weights 3,5", half, i * 7 * LANES, LANES, total, i * 5 * LANES, LANES)
            for tap in range(taps * taps):
                p, q = tap // taps * s.stride + row, tap % taps * s.stride + column
                if p < size and q < size:
                    for o in range(min(LANES, s.maps - lane)):
                        dw[p, q, channel, group * s.maps + lane + o] = total[tap * LANES + o]


_TILE: Final = {3: 4, 5: 3}  # outputs of a tile for a number of taps


def _taps(size: int, stride: int) -> int:
    """Taps of a filter over every stride-th pixel."""
    return -(-size // stride)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
