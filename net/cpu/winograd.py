"""Convolution with fewer multiplications: Winograd's tiles.

What is computed is the convolution of ``net/reference/convolution.py``. A tile of m x m outputs of an r x r filter is
computed from n x n inputs, n = m + r - 1, through the small matrices of ``cook_toom.py``::

    y = Aᵀ [ sum_a (G w_a Gᵀ) * (B d_a Bᵀ) ] A                     a: input channels, *: element by element

The sum over the channels at each of the n² places is what takes the time, and it is a matrix product: tiles times
channels, times channels times maps. For 3x3 filters and 4x4 tiles these products have 36 multiplications where the
convolution itself has 144; for 5x5 filters and 3x3 tiles 49 instead of 225.

Backward
    dx is a convolution of dy with the filters turned by 180 degrees and with inputs and maps exchanged: the same code.
    dw is in ``winograd_gradient.py``.

How the work is laid out
    - **Canvas.** The input of a few images is copied into a zero-padded field first, so that no later step knows of
      borders. Several images share one field, a *mosaic*, with common gutters of zeros: 13 x 13 outputs need 4 x 4
      tiles of 4 an image, but only 7 x 7 for four images together, 23% fewer.
    - **Stride.** A filter with stride s is a filter with stride 1 over the s² interleaved pictures of every s-th pixel:
      the canvas is filled that way. conv1, 11x11x3 with stride 4, becomes 3x3x48: 2.25 x 48 multiplications an output
      instead of 363.
    - **One core, one mosaic.** Canvas, transformed tiles, products and outputs of a mosaic stay in the core's cache
      from beginning to end; memory sees the input once and the output once.

Layouts (flat arrays)
    canvas    [row][column][group][channel]       channels padded to full vectors
    tiles     [place][tile][channel]              transformed inputs: rows of a product, left operand
    products  [place][panel][tile][PANEL maps]    transformed outputs: panels of a product, result or right operand
    filters   [place][group][panel][channel][PANEL maps]
Places are a cache line more than a whole number of pages apart, so that the n² values of one tile do not fall on the
same lines of the cache.

Gain: conv3 of 16 images by im2col and BLAS 31 ms, this way 21 (`python -m bench.kernels convolution`, docs/cpu.md).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numba
import numpy as np

from net.cpu.jit import inner, kernel, prange
from net.cpu.memory import empty
from net.cpu.product import times_panels
from net.cpu.simd import BLOCK, LANES, PANEL, WIDE, copy, lines, transform

SHIFT: Final = 16  # floats in a cache line: the distance that places are put further apart
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
        # Few channels: the transformed tiles stay in the second-level cache while panel after panel uses them.
        pieces = -(-block // fitting)
        block, strip = min(block, _up(-(-block // pieces), BLOCK)), 2 if WIDE else 1
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
        tiles=empty((threads, places * (s.block * s.depth_padded + SHIFT))),
        products=empty((threads, places * (s.block * s.strip * PANEL + SHIFT))),
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
    tiles_step, products_step = s.block * s.depth_padded + SHIFT, s.block * s.strip * PANEL + SHIFT
    scratch = lines(8 * 8 * LANES)
    fill_canvas(x, first, s, canvas)
    for first_tile in range(0, s.tile_rows * s.tile_columns, s.block):
        count = min(s.block, s.tile_rows * s.tile_columns - first_tile)
        for group in range(s.groups):
            piece = (first_tile // s.block * s.groups + group) * panels
            from_panel, to_panel = max(begin - piece, 0), min(end - piece, panels)
            if from_panel >= to_panel:
                continue
            transform_inputs(
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
                vectors = min(2 * now, (s.maps + LANES - 1) // LANES - 2 * first_panel)
                for place in range(places):
                    times_panels(
                        tiles,
                        place * tiles_step,
                        s.depth_padded,
                        u,
                        ((place * s.groups + group) * panels + first_panel) * s.depth * PANEL,
                        s.depth * PANEL,
                        products,
                        place * products_step,
                        PANEL,
                        count * PANEL,
                        count,
                        vectors,
                        s.depth,
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
def transform_inputs(
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


_TILE: Final = {3: 4, 5: 3}  # outputs of a tile for a number of taps


def _taps(size: int, stride: int) -> int:
    """Taps of a filter over every stride-th pixel."""
    return -(-size // stride)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
