"""AlexNet's convolutions one by one in bfloat16: columns and cuBLAS, the kernels of net/gpu/implicit.cu, and cuDNN.

    python -m bench.gpu_convolution --batch 128 1024
    python -m bench.gpu_convolution --tune        every tile and number of stages, to see what the plans miss

Microseconds of the forward pass, of the weights' gradient and of the input's gradient, medians, with the second-level
cache overwritten before each run. What a layer needs beside its products counts (columns, folding, turned weights); the
conversion of the weights and the bias do not. cuDNN is called through PyTorch, where that is installed, with channels
last and ``benchmark`` on. Results are compared with those of columns and cuBLAS.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

from bench import command
from net.alexnet import alexnet
from net.backend import BackendUnavailableError, load
from net.gpu import convolution, implicit
from net.gpu.arrays import pictures
from net.gpu.device import current
from net.gpu.shape import ConvShape, layer_shape
from net.layers import Conv
from pipeline.command_line import at_least_one

Run = Callable[[], Any]
PASSES = ("y", "dw", "dx")
SIDE = 227


@dataclass(frozen=True)
class Layer:
    name: str
    shape: ConvShape
    x: Any
    w: Any
    dy: Any


def layers(ops: ModuleType, images: int) -> Iterator[Layer]:
    """The five convolutions on random pictures, in bfloat16."""
    size: tuple[int, ...] = (SIDE, SIDE, 3)
    for layer in alexnet(1000):
        if isinstance(layer, Conv):
            shape = layer_shape(layer, size, images)
            random = np.random.default_rng(shape.maps)
            w = random.standard_normal((layer.size, layer.size, size[2] // layer.groups, layer.maps), dtype=np.float32)
            x, dy = (_random_pictures(ops, images, s, random) for s in (size, layer.output_shape(size)))
            yield Layer(layer.name, shape, x, ops.asarray(w / 16), dy)
        size = layer.output_shape(size)


def _random_pictures(ops: ModuleType, images: int, size: tuple[int, ...], random: np.random.Generator) -> Any:
    some = random.standard_normal((8, *size), dtype=np.float32)
    part = ops.asarray(np.concatenate([some] * (images // 8)))
    return pictures(part)


def passes(layer: Layer, *, columns: bool) -> dict[str, Run]:
    """The three passes by columns and cuBLAS, or by the kernels without columns."""
    shape, dy = layer.shape, layer.dy
    if columns:
        matrix = convolution.packed(layer.w, shape)
        # On a card of little memory the batch goes through in pieces, which make their columns themselves.
        whole = convolution.images_at_once(shape) == shape.images
        made = convolution.columns(layer.x, shape) if whole else None
        return {
            "y": lambda: convolution.columns_product(layer.x, matrix, shape, keep_columns=False)[0],
            "dw": lambda: convolution.columns_weight_gradient(dy, layer.x, made, shape),
            "dx": lambda: convolution.columns_input_gradient(dy, matrix, shape),
        }
    folded, matrix = convolution.operands(layer.x, layer.w, shape)

    def forward() -> Any:
        return implicit.forward(implicit.fold(layer.x, shape), matrix, shape)

    found: dict[str, Run] = {"y": forward, "dw": lambda: implicit.weight_gradient(dy, folded, shape)}
    if shape.stride == 1:
        found["dx"] = lambda: implicit.input_gradient(dy, matrix, shape)
    return found


def torch_passes(layer: Layer, ops: ModuleType) -> dict[str, Run]:
    import torch

    torch.backends.cudnn.benchmark = True
    shape = layer.shape

    def tensor(a: Any) -> Any:
        values = torch.from_numpy(ops.to_host(a)).cuda().bfloat16().permute(0, 3, 1, 2)
        return values.contiguous(memory_format=torch.channels_last)

    x, dy = tensor(layer.x), tensor(layer.dy)
    w = torch.from_numpy(ops.to_host(layer.w)).cuda().bfloat16().permute(3, 2, 0, 1)
    w = w.contiguous(memory_format=torch.channels_last)
    geometry = ([shape.stride] * 2, [shape.pad] * 2, [1, 1])

    def back(*wanted: bool) -> Any:
        return torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, False, [0, 0], shape.groups, wanted)

    return {
        "y": lambda: torch.nn.functional.conv2d(x, w, None, shape.stride, shape.pad, 1, shape.groups),
        "dw": lambda: back(False, True, False),
        "dx": lambda: back(True, False, False),
    }


def microseconds(run: Run, clear: Run, *, stream: Any, event: Callable[[], Any], rounds: int) -> float:
    """Median time of ``run`` on the device; ``event`` makes an event that has been recorded."""
    for _ in range(min(3, rounds)):
        run()
    pairs = []
    for _ in range(rounds):
        clear()
        begin = event()
        run()
        pairs.append((begin, event()))
    stream.synchronize()
    return statistics.median(_elapsed(*pair) for pair in pairs)


def _elapsed(begin: Any, end: Any) -> float:
    if hasattr(begin, "elapsed_time"):
        return float(begin.elapsed_time(end)) * 1e3
    return float(current().cupy.cuda.get_elapsed_time(begin, end)) * 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("gpu_convolution", __doc__)
    parser.add_argument("--batch", nargs="+", type=at_least_one, default=[128, 1024])
    parser.add_argument("--rounds", type=at_least_one, default=15)
    parser.add_argument("--tune", action="store_true", help="every tile and number of stages")
    options = parser.parse_args(arguments)
    try:
        ops = load("gpu", "bf16")
    except BackendUnavailableError as error:
        raise SystemExit(f"bench.gpu_convolution: {error}") from error
    device = current()
    scratch, zeros = (ops.empty((2**28,), "uint8") for _ in range(2))

    def clear() -> None:
        scratch.data.copy_from_device_async(zeros.data, scratch.nbytes, device.stream)

    def event() -> Any:
        made = device.cupy.cuda.Event()
        made.record(device.stream)
        return made

    def timed(run: Run) -> float:
        return microseconds(run, clear, stream=device.stream, event=event, rounds=options.rounds)

    print(f"{ops.describe()}; microseconds, bf16")
    for images in options.batch:
        print(
            f"{'batch ' + str(images):18s} {'columns':>9s} {'implicit':>9s} {'TFLOP/s':>8s} {'cuDNN':>9s}   difference"
        )
        for layer in layers(ops, images):
            shape = layer.shape
            if not implicit.possible(shape):
                print(f"{layer.name}: the kernels of implicit.cu are not made for {shape}")
                continue
            by_columns, ours = passes(layer, columns=True), passes(layer, columns=False)
            theirs = _with_torch(layer, ops)
            work = 2.0 * shape.images * shape.pixels * shape.depth * shape.maps
            for name in PASSES:
                if name == "dx" and layer.name == "conv1":
                    continue
                a, b = (ops.to_host(p[name]()).astype(np.float64) for p in (by_columns, ours))
                apart = np.linalg.norm(a - b) / np.linalg.norm(a)
                mine = timed(ours[name])
                columns, cudnn = timed(by_columns[name]), theirs(name, options.rounds)
                rate = work / mine / 1e6 if mine else 0.0
                place = f"{layer.name} {name}"
                print(f"{place:18s} {columns:9.1f} {mine:9.1f} {rate:8.0f} {cudnn:>9s}   {apart:.1e}", flush=True)
                if options.tune:
                    _tune(ours[name], name, timed)


def _with_torch(layer: Layer, ops: ModuleType) -> Callable[[str, int], str]:
    try:
        import torch
    except ImportError:
        return lambda name, rounds: "-"
    if not torch.cuda.is_available():  # a build for the CPU
        return lambda name, rounds: "-"
    runs = torch_passes(layer, ops)
    scratch = torch.empty(2**28, dtype=torch.uint8, device="cuda")

    def event() -> Any:
        made = torch.cuda.Event(enable_timing=True)
        made.record()
        return made

    def timed(name: str, rounds: int) -> str:
        stream = torch.cuda.current_stream()
        return f"{microseconds(runs[name], scratch.zero_, stream=stream, event=event, rounds=rounds):.1f}"

    return timed


class _TooLargeError(Exception):
    """The card has not so much shared memory: 99 KiB a block on consumers' cards, where Hopper has 227."""


def _tune(run: Run, name: str, timed: Callable[[Run], float]) -> None:
    """Replace the plans one by one."""
    found = []
    for tile in implicit.TILES:
        if name == "dw" and tile == 48:
            continue
        for stages in (2, 3, 4):
            with mock.patch.multiple(implicit, TILES=(tile,), slices=partial(_slices, stages)):
                try:
                    found.append(f"{tile}x{stages} {timed(run):.1f}")
                except _TooLargeError:
                    found.append(f"{tile}x{stages} too large")
    print("   ", "  ".join(found), flush=True)


def _slices(stages: int, tile: int, beside: int, room: implicit.Room) -> int:
    if not implicit.fits(stages, tile, beside, room):
        raise _TooLargeError
    return stages


if __name__ == "__main__":
    main()
