"""Rounding of every layer on the CPU beside PyTorch's, against float64: ``python -m bench.cpu_error``.

Both get the same float32 numbers in the sizes of AlexNet. The error is the root of the mean squared difference to the
float64 result, relative to the root of its mean square. Exit status 1 where ours is larger than allowed: four times
PyTorch's where Winograd's transforms are used, twice elsewhere.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

import net.cpu
from bench import command
from pipeline.command_line import at_least_one

#  name: picture's side, channels in, channels out, kernel, stride, pad, groups
CONVOLUTIONS = {
    "conv1": (227, 3, 96, 11, 4, 0, 1),
    "conv2": (27, 96, 256, 5, 1, 2, 2),
    "conv3": (13, 256, 384, 3, 1, 1, 1),
    "conv4": (13, 384, 384, 3, 1, 1, 2),
    "conv5": (13, 384, 256, 3, 1, 1, 2),
}
LINEAR = {"fc6": (9216, 4096), "fc7": (4096, 4096), "fc8": (4096, 1000)}
WINOGRAD_BOUND, BOUND = 4.0, 2.0


def error(a: np.ndarray, oracle: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - oracle) ** 2) / np.mean(oracle**2)))


def _torch(a: np.ndarray, order: tuple[int, ...], double: bool) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(a.transpose(order)))
    return (tensor.double() if double else tensor).requires_grad_()


def convolution(name: str, images: int) -> dict[str, tuple[float, float]]:
    """Errors (ours, PyTorch's) of y, dx and dw."""
    side, channels, maps, size, stride, pad, groups = CONVOLUTIONS[name]
    random = np.random.default_rng(sum(name.encode()))
    # Inputs of later layers come from a ReLU.
    x = np.maximum(random.standard_normal((images, side, side, channels), dtype=np.float32), 0)
    w = random.standard_normal((size, size, channels // groups, maps), dtype=np.float32) * np.float32(0.02)
    b = np.zeros(maps, np.float32)
    y = net.cpu.conv2d_forward(x, w, b, stride=stride, pad=pad, groups=groups)
    dy = random.standard_normal(y.shape, dtype=np.float32)
    dx, dw, _ = net.cpu.conv2d_backward(dy, x, w, stride=stride, pad=pad, groups=groups, need_dx=name != "conv1")
    ours = {"y": y, "dx": dx, "dw": dw}
    sides = []
    for double in (True, False):
        tx, tw, tdy = (_torch(a, o, double) for a, o in ((x, (0, 3, 1, 2)), (w, (3, 2, 0, 1)), (dy, (0, 3, 1, 2))))
        ty = functional.conv2d(tx, tw, None, stride, pad, 1, groups)
        ty.backward(tdy.detach())
        back = (0, 2, 3, 1)
        sides.append(
            {
                "y": ty.detach().numpy().transpose(back),
                "dx": tx.grad.numpy().transpose(back),
                "dw": tw.grad.numpy().transpose(2, 3, 1, 0),
            }
        )
    oracle, theirs = sides
    return {
        k: (error(ours[k], oracle[k]), error(theirs[k], oracle[k])) for k in ("y", "dx", "dw") if ours[k] is not None
    }


def linear(name: str, images: int) -> dict[str, tuple[float, float]]:
    depth, units = LINEAR[name]
    random = np.random.default_rng(sum(name.encode()))
    x = np.maximum(random.standard_normal((images, depth), dtype=np.float32), 0)
    w = random.standard_normal((depth, units), dtype=np.float32) * np.float32(0.02)
    dy = random.standard_normal((images, units), dtype=np.float32)
    y = net.cpu.linear_forward(x, w, np.zeros(units, np.float32))
    dx, dw, _ = net.cpu.linear_backward(dy, x, w)
    wide = [a.astype(np.float64) for a in (x, w, dy)]
    oracle = (wide[0] @ wide[1], wide[2] @ wide[1].T, wide[0].T @ wide[2])
    tx, tw, tdy = (torch.from_numpy(a) for a in (x, w, dy))
    theirs = ((tx @ tw).numpy(), (tdy @ tw.T).numpy(), (tx.T @ tdy).numpy())
    return {
        k: (error(o, e), error(t, e)) for k, o, t, e in zip(("y", "dx", "dw"), (y, dx, dw), theirs, oracle, strict=True)
    }


def lrn(images: int) -> dict[str, tuple[float, float]]:
    random = np.random.default_rng(5)
    x = np.maximum(random.standard_normal((images, 55, 55, 96), dtype=np.float32) * np.float32(50), 0)
    dy = random.standard_normal(x.shape, dtype=np.float32)
    y, s = net.cpu.lrn_forward(x, size=5, k=2.0, alpha=1e-4, beta=0.75)
    dx = net.cpu.lrn_backward(dy, x, s, size=5, alpha=1e-4, beta=0.75)
    sides = []
    for double in (True, False):
        tx, tdy = (_torch(a, (0, 3, 1, 2), double) for a in (x, dy))
        ty = functional.local_response_norm(tx, 5, alpha=5e-4, beta=0.75, k=2.0)
        ty.backward(tdy.detach())
        sides.append([a.numpy().transpose(0, 2, 3, 1) for a in (ty.detach(), tx.grad)])
    return {k: (error(a, o), error(t, o)) for k, a, o, t in zip(("y", "dx"), (y, dx), *sides, strict=True)}


def main() -> int:
    parser = command("cpu_error", __doc__)
    parser.add_argument("--images", type=at_least_one, default=8)
    options = parser.parse_args()
    rows = {name: convolution(name, options.images) for name in CONVOLUTIONS}
    rows |= {"lrn1": lrn(options.images)} | {name: linear(name, options.images) for name in LINEAR}
    within = True
    print("| layer | result | ours | PyTorch | ratio | bound |\n|---|---|---|---|---|---|")
    for name, results in rows.items():
        bound = WINOGRAD_BOUND if name in CONVOLUTIONS else BOUND
        for what, (ours, theirs) in results.items():
            within &= ours <= bound * theirs
            print(f"| {name} | {what} | {ours:.1e} | {theirs:.1e} | {ours / theirs:.2f} | {bound:g} |")
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
