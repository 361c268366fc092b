"""Predicted times of the GPU backend: bytes and operations of every kernel against what a card can do.

    python -m bench.gpu_model                       the tables of docs/gpu_tables.md
    python -m bench.gpu_model --card H200 --precision tf32 --batch 1024     the second of them for another card

A kernel takes the longest of three times, plus the gap to the next kernel in a recorded graph:

    bytes it must move       /  (memory bandwidth * REACHED_BANDWIDTH)
    multiply-adds * 2        /  (peak of the matrix product's arithmetic * REACHED_PEAK * share of full waves)
    what it copies to shared memory  /  (bandwidth of the second-level cache * share of full waves)
    its other instructions   /  (lanes * clock * REACHED_INSTRUCTIONS)

Each array is read or written once a kernel and nothing stays in the cache from kernel to kernel, which is pessimistic
for small batches. The factors are judgement, not measurement. The point of writing the prediction down is that a
measurement can refute it: ``python -m bench.gpu --kernels`` puts every kernel's time on a card beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Final

import net.gpu as gpu
from bench import command
from net.alexnet import alexnet
from net.gpu import implicit
from net.gpu.blocks import tile
from net.gpu.shape import ConvShape, layer_shape
from net.layers import ConvBlock, Dropout, Flatten, Layer, Linear, LinearBlock, fuse
from pipeline.command_line import at_least_one

REACHED_BANDWIDTH: Final = 0.85
REACHED_PEAK: Final = 0.65
REACHED_INSTRUCTIONS: Final = 0.5
GAP: Final = 1.5e-6  # seconds between two kernels of a graph
TILE: Final = 128  # rows and columns of a product that one SM computes
EPOCH: Final = 1_281_167  # pictures of ILSVRC-2012's training set

# Instructions an element, counted in the machine code of the inner loops (sm_90, bfloat16, NVRTC 12.9); only those that
# may matter beside the bytes. Branches that AlexNet's sizes do not take are left out.
INSTRUCTIONS: Final = {
    "augment": 30,
    "columns_any": 13,
    "columns_wide": 5.5,
    "gather_wide": 8,
    "block_forward": 44,
    "block_forward without LRN": 25,
    "block_backward": 90,
    "block_backward without LRN": 55,
}


@dataclass(frozen=True)
class Card:
    """Peaks from the makers' data sheets, without sparsity."""

    name: str
    bandwidth: float  # bytes a second
    peak: dict[str, float]  # multiply-adds * 2 a second, sums in float32
    processors: int  # multiprocessors (SMs)
    clock: float  # hertz
    memory: int  # bytes
    cache: float  # bytes a second from the second-level cache to the SMs; measured by others, not in data sheets
    shared_processor: int  # bytes of shared memory an SM has

    @property
    def instructions(self) -> float:
        """Instructions of all lanes a second."""
        return self.processors * 128 * self.clock


HOPPER: Final = {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12}
AMPERE: Final = {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}
ADA: Final = {"bf16": 165.2e12, "tf32": 82.6e12, "fp32": 82.6e12}
H100: Final = Card("H100 SXM", 3.35e12, HOPPER, 132, 1.755e9, 80 * 2**30, 5.5e12, 228 * 1024)
H200: Final = Card("H200", 4.8e12, HOPPER, 132, 1.755e9, 141 * 10**9, 5.5e12, 228 * 1024)
# The A100's second-level cache, 4.5e12, is a guess between the data sheet's peak and what others measure of Hopper's.
A100: Final = Card("A100 SXM 80 GB", 2.039e12, AMPERE, 108, 1.41e9, 80 * 2**30, 4.5e12, 164 * 1024)
RTX4090: Final = Card("RTX 4090", 1.008e12, ADA, 128, 2.52e9, 24 * 2**30, 5e12, 100 * 1024)
CARDS: Final = (H100, H200, A100, RTX4090)
PRECISIONS: Final = ("bf16", "tf32", "fp32")
BATCHES: Final = (128, 1024)
# Images/s of a training step on a batch that stays on the card: python -m bench.gpu, 2026-11-26 (docs/gpu.md).
MEASURED: Final = {
    (H100.name, "bf16", 128): 38_420,
    (H100.name, "bf16", 1024): 53_800,
    (H100.name, "tf32", 128): 18_496,
    (H100.name, "fp32", 128): 7_981,
}


@dataclass(frozen=True)
class Kernel:
    """One launch: of which layer, which kernel ("product" is cuBLAS), and what it must move and compute."""

    layer: str
    name: str
    bytes: float
    products: float = 0.0  # multiply-adds * 2
    waves: float = 1.0  # share of the SMs busy over the product's waves
    instructions: float = 0.0
    copied: float = 0.0  # bytes to shared memory

    def times(self, card: Card, precision: str) -> dict[str, float]:
        """Seconds by what each resource takes."""
        peak = card.peak[precision] * REACHED_PEAK * self.waves
        return {
            "memory": self.bytes / (card.bandwidth * REACHED_BANDWIDTH),
            "products": self.products / peak,
            "cache": self.copied / (card.cache * self.waves),
            "instructions": self.instructions / (card.instructions * REACHED_INSTRUCTIONS),
        }

    def seconds(self, card: Card, precision: str) -> float:
        return max(self.times(card, precision).values()) + GAP


@dataclass(frozen=True)
class Setting:
    card: Card
    precision: str
    batch: int

    @property
    def picture(self) -> int:
        """Bytes of an element of a picture, and of a product's operand."""
        return 2 if self.precision == "bf16" else 4


def training_step(layers: Sequence[Layer], shape: tuple[int, int, int], crop: int, s: Setting) -> list[Kernel]:
    """Every kernel of a training step of ``layers``, fused as the backend fuses them, in order."""
    fused = fuse(layers, gpu)
    forward, backward, kept = [*_augment(shape, crop, s)], [], shape
    for number, layer in enumerate(fused):
        forward += _forward(layer, kept, s, training=True)
        backward.append((layer, kept, number > 0))
        kept = layer.output_shape(kept)
    classes = kept[0]
    forward.append(Kernel("loss", "cross_entropy", s.batch * classes * 8))
    for layer, before, need_dx in reversed(backward):
        forward += _backward(layer, before, s, need_dx)
        for parameter in layer.parameter_shapes(before).values():
            forward.append(Kernel("update", "sgd_update", prod(parameter) * 4 * 5))
    return forward


def prediction(layers: Sequence[Layer], shape: tuple[int, int, int], crop: int, s: Setting) -> list[Kernel]:
    """Every kernel of a forward pass in test, without the few elementwise operations CuPy makes itself."""
    kernels, kept = [*_augment(shape, crop, s)], shape
    for layer in fuse(layers, gpu):
        kernels += _forward(layer, kept, s, training=False)
        kept = layer.output_shape(kept)
    return [*kernels, Kernel("loss", "softmax", s.batch * kept[0] * 8)]


def _augment(shape: tuple[int, int, int], crop: int, s: Setting) -> Iterator[Kernel]:
    values = s.batch * prod(shape)
    moved = s.batch * crop * crop * 3 + values * s.picture
    yield Kernel("input", "augment", moved, instructions=values * INSTRUCTIONS["augment"])


def _forward(layer: Layer, shape: tuple[int, ...], s: Setting, *, training: bool) -> Iterator[Kernel]:
    n, item = s.batch, s.picture
    if isinstance(layer, ConvBlock):
        c, name = layer_shape(layer.conv, shape, n), layer.conv.name
        result = n * c.pixels * c.maps
        without_columns = _without_columns(c, s)
        if without_columns:
            yield from _implicit_operands(name, c, s)
            yield _implicit(name, implicit.fold_shape(c), c.pixels, s)
        else:
            yield from _packed(name, c.depth * c.maps, c.padded * c.maps, s, always=c.padded != c.depth)
            piece = _piece(c, s)
            for first in range(0, n, piece):
                yield _columns(name, replace(c, images=min(piece, n - first)), s)
                yield _product(name, replace(c, images=min(piece, n - first)), s)
        if layer.lrn is None and layer.pool is None:
            if without_columns:
                return
            yield Kernel(name, f"bias_{_each(c.maps)}", 2 * result * item)
            return
        out = n * prod(layer.output_shape(shape))
        moved = (result + out) * item + (out if training and layer.pool else 0)
        # Pixels under the edges of two tiles are computed twice, but mostly come from the cache.
        size, stride = (layer.pool.size, layer.pool.stride) if layer.pool else (1, 1)
        height, width, _ = layer.output_shape(shape)
        rows, columns = tile(height, width, size, stride, c.maps)
        work = (
            ceil(height / rows) * ceil(width / columns) * ((rows - 1) * stride + size) * ((columns - 1) * stride + size)
        )
        kind = "block_forward" if layer.lrn else "block_forward without LRN"
        instructions = n * work * c.maps * INSTRUCTIONS[kind]
        yield Kernel(name, f"block_forward_{_each(c.maps)}", moved, instructions=instructions)
    elif isinstance(layer, Linear | LinearBlock):
        linear = layer.linear if isinstance(layer, LinearBlock) else layer
        d, k = shape[0], linear.units
        if item == 2 and linear.name != "fc6":  # which gets pictures, in the products' type already
            yield Kernel(linear.name, "cast_from_float", n * d * 6)
        yield from _packed(linear.name, d * k, d * k, s)
        yield _gemm(linear.name, n, k, d, s, out_item=4)
        yield Kernel(linear.name, f"bias_{_each(k)}", 2 * n * k * 4)
    elif isinstance(layer, Dropout):
        if training:
            yield Kernel(f"dropout{layer.number}", "dropout", 2 * n * prod(shape) * 4)
    elif not isinstance(layer, Flatten):
        raise NotImplementedError(f"the model knows no {layer}")


def _backward(layer: Layer, shape: tuple[int, ...], s: Setting, need_dx: bool) -> Iterator[Kernel]:
    n, item = s.batch, s.picture
    if isinstance(layer, ConvBlock):
        c, name = layer_shape(layer.conv, shape, n), layer.conv.name
        out, result = n * prod(layer.output_shape(shape)), n * c.pixels * c.maps
        if item == 2 and layer.pool and len(layer.output_shape(shape)) == 3 and name == "conv5":
            yield Kernel(name, "cast_from_float", out * 6)  # fc6 hands its gradient over as float32
        kind = "block_backward" if layer.lrn else "block_backward without LRN"
        yield Kernel(
            name,
            f"block_backward_{_each(c.maps)}",
            2 * result * item + out * (item + (1 if layer.pool else 0)),
            instructions=result * INSTRUCTIONS[kind],
        )
        yield Kernel(name, "column_sum_last", 1024 * c.maps * 4)
        if _without_columns(c, s):
            yield from _implicit_weight_gradient(name, c, s)
            if need_dx:
                yield Kernel(name, "turn_weights", 2 * c.depth * c.maps * item)
                yield _implicit(name, implicit.backwards(c), c.height * c.width, s)
            return
        piece = _piece(c, s)
        for first in range(0, n, piece):
            part = replace(c, images=min(piece, n - first))
            if piece < n:
                yield _columns(name, part, s)
            for _ in range(c.groups):
                yield _product(name, part, s, weights=True)
        if need_dx:
            for first in range(0, n, piece):
                part = replace(c, images=min(piece, n - first))
                yield _product(name, part, s)
                columns, pixels = part.images * c.pixels * c.row, part.images * c.height * c.width * c.channels
                wide = c.channels // c.groups % (16 // item) == 0
                yield Kernel(
                    name,
                    "gather_wide" if wide else "gather_any",
                    (columns + pixels) * item,
                    instructions=columns * INSTRUCTIONS["gather_wide"],
                )
    elif isinstance(layer, Linear | LinearBlock):
        linear = layer.linear if isinstance(layer, LinearBlock) else layer
        d, k = shape[0], linear.units
        if isinstance(layer, LinearBlock):
            yield Kernel(linear.name, "relu_backward", 3 * n * k * 4)
        if item == 2:
            yield Kernel(linear.name, "cast_from_float", n * k * 6)
        if isinstance(layer, Linear) and item == 2:
            # Not a block: the operands are converted again.
            yield Kernel(linear.name, "cast_from_float", n * d * 6)
            yield from _packed(linear.name, d * k, d * k, s)
        yield _gemm(linear.name, d, k, n, s, out_item=4)
        yield _gemm(linear.name, n, d, k, s, out_item=4)
        yield Kernel(linear.name, "column_sum", n * k * 4)
        yield Kernel(linear.name, "column_sum_last", 512 * k * 4)
    elif isinstance(layer, Dropout):
        yield Kernel(f"dropout{layer.number}", "dropout", 2 * n * prod(shape) * 4)


def _without_columns(c: ConvShape, s: Setting) -> bool:
    return s.precision == "bf16" and implicit.takes(c)


def _implicit_operands(name: str, c: ConvShape, s: Setting) -> Iterator[Kernel]:
    if c.stride == 1:
        yield from _packed(name, c.depth * c.maps, c.depth * c.maps, s)
        return
    folded = implicit.fold_shape(c)
    pictures = c.images * (c.height * c.width * c.channels + folded.height * folded.width * folded.channels)
    yield Kernel(name, "fold_picture", pictures * s.picture)
    yield Kernel(name, "fold_weights", c.depth * c.maps * 4 + folded.depth * c.maps * s.picture)


def _implicit(name: str, c: ConvShape, pixels: int, s: Setting) -> Kernel:
    """y or dx, ``pixels`` of an image."""
    plan = implicit.product_plan(c, pixels, s.card)
    moved = c.images * (c.height * c.width * c.channels + pixels * c.maps) + c.depth * c.maps
    work = 2.0 * c.images * pixels * c.depth * c.maps
    return _implicit_kernel(name, f"convolve_{plan.tile}", plan, moved * s.picture, work, c.depth, s)


def _implicit_weight_gradient(name: str, c: ConvShape, s: Setting) -> Iterator[Kernel]:
    folded, plan = implicit.fold_shape(c), implicit.gradient_plan(c, s.card)
    pictures = c.images * (folded.height * folded.width * folded.channels + c.pixels * c.maps)
    parts = plan.count * folded.depth * c.maps * 4
    work = 2.0 * c.images * c.pixels * folded.depth * c.maps
    kernel, moved = f"weight_gradient_{plan.tile}", pictures * s.picture + parts
    yield _implicit_kernel(name, kernel, plan, moved, work, plan.stretch, s)
    yield Kernel(name, "add_parts", parts + c.depth * c.maps * 4)


def _implicit_kernel(
    name: str, kernel: str, plan: implicit.Plan, moved: float, work: float, terms: int, s: Setting
) -> Kernel:
    blocks = plan.blocks * plan.count
    copied = blocks * terms * (implicit.ROWS + plan.tile) * s.picture
    places = s.card.processors * implicit.together(plan, s.card)
    waves = blocks / (ceil(blocks / places) * places)
    return Kernel(name, kernel, moved, products=work, waves=waves, copied=copied)


def _packed(name: str, read: int, written: int, s: Setting, *, always: bool = False) -> Iterator[Kernel]:
    """The weights as the products take them."""
    if s.picture == 2 or always:
        yield Kernel(name, "cast_from_float", read * 4 + written * s.picture)


def _columns(name: str, c: ConvShape, s: Setting) -> Kernel:
    wide = c.channels // c.groups % (16 // s.picture) == 0
    kernel = "columns_wide" if wide else "columns_any"
    made = c.images * c.pixels * c.row
    read = c.images * c.height * c.width * c.channels
    return Kernel(name, kernel, (made + read) * s.picture, instructions=made * INSTRUCTIONS[kernel])


def _product(name: str, c: ConvShape, s: Setting, *, weights: bool = False) -> Kernel:
    """columns w or dy w' for all groups at once; with ``weights``, columns' dy for one group."""
    rows, each = c.images * c.pixels, c.maps // c.groups
    if weights:
        return _gemm(name, c.padded, each, rows, s, out_item=4)
    one = _gemm(name, rows, each, c.padded, s, out_item=s.picture)
    tiles = c.groups * ceil(rows / TILE) * ceil(each / TILE)
    moved, work = one.bytes * c.groups, one.products * c.groups
    return replace(one, bytes=moved, products=work, waves=_waves(tiles, s))


def _gemm(name: str, m: int, n: int, k: int, s: Setting, *, out_item: int) -> Kernel:
    moved = (m * k + k * n) * s.picture + m * n * out_item
    # Where the tiles do not fill the card the long sum is split, in pieces of at least 512 terms.
    tiles = ceil(m / TILE) * ceil(n / TILE)
    if tiles < s.card.processors:
        tiles *= max(1, min(s.card.processors // tiles, k // 512))
    return Kernel(name, "product", moved, products=2.0 * m * n * k, waves=_waves(tiles, s))


def _waves(tiles: int, s: Setting) -> float:
    return tiles / (ceil(tiles / s.card.processors) * s.card.processors)


def _piece(c: ConvShape, s: Setting) -> int:
    return c.images_at_once(s.card.memory, s.picture)


def _each(channels: int) -> int:
    return 4 if channels % 4 == 0 else 1


# --- tables --------------------------------------------------------------------------------------------------------

LAYERS: Final = alexnet(1000)
SHAPE: Final = (227, 227, 3)
CROP: Final = 224


def summary() -> str:
    """The training step's time and rate on every card, beside what was measured, and the rate of evaluation."""
    lines = [
        "| card | precision | batch | training step, ms | images/s | measured | 90 epochs, min | evaluation, crops/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for card in CARDS:
        for precision, batch in (
            ("bf16", BATCHES[0]),
            ("bf16", BATCHES[1]),
            ("tf32", BATCHES[0]),
            ("fp32", BATCHES[0]),
        ):
            s = Setting(card, precision, batch)
            step = _total(training_step(LAYERS, SHAPE, CROP, s), s)
            views = _total(prediction(LAYERS, SHAPE, CROP, s), s)
            known = MEASURED.get((card.name, precision, batch))
            lines.append(
                f"| {card.name} | {precision} | {batch} | {step * 1e3:.2f} | {batch / step:,.0f} "
                f"|{f' **{known:,}**' if known else ''} "
                f"| {90 * EPOCH * step / batch / 60:.0f} | {batch / views:,.0f} |"
            )
    return "\n".join(lines)


def by_layer(s: Setting) -> str:
    """Where a training step's time goes, and what bounds it there."""
    kernels = training_step(LAYERS, SHAPE, CROP, s)
    total = _total(kernels, s)
    lines = [
        "| layer | kernels | GB | GFLOP | us | share | bound by |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in dict.fromkeys(k.layer for k in kernels):
        own = [k for k in kernels if k.layer == layer]
        seconds = _total(own, s)
        bounds: dict[str, float] = {}
        for k in own:
            times = k.times(s.card, s.precision)
            longest = max(times, key=times.__getitem__)
            bounds[longest] = bounds.get(longest, 0.0) + times[longest]
        named = ", ".join(f"{name} {t / seconds:.0%}" for name, t in sorted(bounds.items(), key=lambda b: -b[1]))
        moved, work = sum(k.bytes for k in own) / 1e9, sum(k.products for k in own) / 1e9
        share = seconds / total
        numbers = f"{len(own)} | {moved:.2f} | {work:,.0f} | {seconds * 1e6:,.0f} | {share:.0%}"
        lines.append(f"| {layer} | {numbers} | {named} |")
    return "\n".join(lines)


def _total(kernels: Sequence[Kernel], s: Setting) -> float:
    return sum(k.seconds(s.card, s.precision) for k in kernels)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("gpu_model", __doc__)
    parser.add_argument("--card", choices=[card.name for card in CARDS], default=H100.name)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--batch", type=at_least_one, default=128)
    options = parser.parse_args(arguments)
    card = next(card for card in CARDS if card.name == options.card)
    print(summary())
    print(f"\n{card.name}, {options.precision}, batch {options.batch}, a training step by layer:\n")
    print(by_layer(Setting(card, options.precision, options.batch)))


if __name__ == "__main__":
    main()
