"""The gradient of a convolution's weights with fewer multiplications: the way of ``winograd.py`` backward.

The derivative of the tiles' formula with respect to w is the same three steps the other way round::

    dw_a = Gᵀ [ sum_tiles (A dy Aᵀ) * (B d_a Bᵀ) ] G            a: input channels, *: element by element

At each of the n² places the sum over the tiles of the batch is a matrix product: channels times tiles, times tiles
times maps. Geometry, canvas and layouts are those of ``winograd.py``; the sums lie as [place][group][channel][map].

The order of additions is the same with any number of threads, and there are two ways to go about it:

- Where the sums are small (conv1, conv2) the batch is dealt out to 16 parts; a core goes through a part's mosaics with
  tiles and sums in its cache, and the parts are added at the end.
- Where they are large, a slab of images is transformed first, each core taking some of the mosaics, and then
  multiplied, each core taking some of the n² places. The slab fits no cache, so it is written past them.

Gain of single steps, such as conv4's products from 60 to 48 ms: docs/cpu.md, "Single changes and what they gave".
"""

from __future__ import annotations

from typing import Final

import numba
import numpy as np

from net.cpu.jit import inner, kernel, prange
from net.cpu.memory import empty
from net.cpu.product import add_times_panels
from net.cpu.simd import BLOCK, LANES, PANEL, fence, lines, stream, transform
from net.cpu.winograd import SHIFT, Shape, fill_canvas, transform_inputs

_SLAB: Final = 24 << 20  # bytes of transformed tiles in the gradient of the weights
_SUMS: Final = 5 << 18  # bytes of a group's sums over tiles that a core may keep beside its tiles
_BESIDE: Final = 1 << 20  # bytes of those tiles
_PARTS: Final = 16  # partial sums of such a gradient, whatever the number of threads


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
    tiles = empty((threads, places * (block * s.depth_padded + SHIFT)))
    products = empty((threads, places * (block * s.maps_padded + SHIFT)))
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
    tiles = empty(places * (count * s.groups * s.depth_padded + SHIFT))
    products = empty(places * (count * s.groups * s.maps_padded + SHIFT))
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
    tiles_step, products_step = block * s.depth_padded + SHIFT, block * s.maps_padded + SHIFT
    for task in prange(tasks):
        scratch, part = lines(8 * 8 * LANES), lines(2 * BLOCK * PANEL)
        for number in range(task, parts, tasks):
            sums = du[number]
            sums[:] = 0
            for first in range(number * images, x.shape[0], parts * images):
                fill_canvas(x, first, s, canvas[task])
                _fill_outputs(dy, first, s, outputs[task])
                for piece in range(s.groups * pieces):
                    group, start = piece // pieces, piece % pieces * block
                    count = min(block, each - start)
                    channel = group * s.depth_padded
                    transform_inputs(
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
                        add_times_panels(
                            tiles[task],
                            place * tiles_step,
                            1,
                            s.depth_padded,
                            products[task],
                            place * products_step,
                            block * PANEL,
                            sums,
                            (place * s.groups + group) * s.depth * s.maps_padded,
                            s.maps_padded,
                            PANEL,
                            s.depth,
                            panels,
                            count,
                            part,
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
    tiles_step = count * row + SHIFT
    products_step = count * s.groups * s.maps_padded + SHIFT
    tasks = canvas.shape[0]
    for task in prange(tasks):
        scratch, made = lines(8 * 8 * LANES), lines(8 * 8 * LANES)
        for mosaic in range(task, mosaics, tasks):
            image = first + mosaic * s.mosaic_rows * s.mosaic_columns
            fill_canvas(x, image, s, canvas[task])
            _fill_outputs(dy, image, s, outputs[task])
            for tile in range(each):
                at = mosaic * each + tile
                for lane in range(0, row, LANES):
                    transform_inputs(canvas[task], lane, LANES, tile, 1, s, made, 0, LANES, LANES, scratch)
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
    tiles_step = count * row + SHIFT
    products_step = count * s.groups * s.maps_padded + SHIFT
    for task in prange(s.n * s.n * s.groups):
        place, group = task // s.groups, task % s.groups
        add_times_panels(
            tiles,
            place * tiles_step + group * s.depth_padded,
            1,
            row,
            products,
            place * products_step + group * panels * count * PANEL,
            count * PANEL,
            du,
            task * s.depth * s.maps_padded,
            s.maps_padded,
            PANEL,
            s.depth,
            panels,
            used,
            lines(2 * BLOCK * PANEL),
        )


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
