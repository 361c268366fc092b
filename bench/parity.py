"""The same network, the same numbers: training steps of this project beside PyTorch's.

PyTorch gets the initial parameters and the batches, and does everything else on its own: preparing the pictures,
grouped convolutions, normalisation, pooling, loss, gradients by its autograd, and the paper's update. Dropout is off,
for two random number generators cannot agree. Compared are

- the gradients of the first batch,
- the loss of each step,
- the parameters after the last step, and how far they have moved from their start.

    python -m bench.parity --device cpu --recipes paper caffe --steps 50 --batch 8 --classes 1000

prints a table for each recipe and exits with status 1 where a bound is broken.

Two programs that round differently cannot follow each other for ever. Where two pixels of a pooling window, or 0 and
the input of a ReLU, differ by less than the rounding, the one program lets the gradient pass here and the other
there; one such pixel of conv5 is a difference of a few thousandths in conv1's gradient. At the learning rate of a
recipe's first epoch, and with few pictures in a batch, training then makes more of it at every step. So float32 is
compared at ``--rate 1e-5``, the rate every recipe ends with, and float64, which only the reference computes in,
at the recipe's own rate: there the sides agree to twelve digits, so the differences in float32 are rounding and
nothing else.

    python -m bench.parity --device reference --precision float64 --batch 2 --steps 5
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F

from bench import command
from bench.blotches import batches
from bench.hand import begin
from net import backend
from net.layers import Run
from net.network import backward, forward, initial_parameters, prepare
from pipeline.command_line import at_least_one
from pipeline.config import RECIPES, Config, Network, at_epoch
from stages.setup import learning_rates, network_layers, shapes

LOSS_BOUND = 1e-4  # of each step's loss, relative
PARAMETER_BOUND = 1e-3  # of each parameter after the last step: norm of the difference over norm
CHANGE_BOUND = 0.2  # of how far each weight, and each bias that began at 0, has moved: would be 1 if it had not

Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Trace:
    """What one side of the comparison computed, as NumPy arrays in this project's layout."""

    losses: np.ndarray  # mean loss of each step
    gradients: Arrays  # of the first batch
    parameters: Arrays  # after the last step


def comparable(recipe: str, rate: float | None = None) -> Config:
    """A recipe without dropout; with ``rate``, at that learning rate, the biases' own in proportion."""
    config = RECIPES[recipe]
    train = config.train
    if rate is not None:
        factor = rate / train.lr[0][1]
        bias_lr = tuple((epoch, factor * own) for epoch, own in train.bias_lr)
        train = replace(train, lr=((0, rate),), bias_lr=bias_lr)
    return replace(config, network=replace(config.network, dropout_keep=1.0), train=train)


def mean_picture(config: Config) -> np.ndarray:
    """Stands for the training pictures' mean: smooth, float32, 0..255, symmetric in no direction."""
    side = config.preprocess.size
    row, column, channel = np.meshgrid(np.arange(side), np.arange(side), np.arange(3), indexing="ij")
    return (120 + 20 * np.sin(row / 70) + 15 * np.cos(column / 50 + channel) - 5 * channel).astype(np.float32)


# --- this project --------------------------------------------------------------------------------------------------


def by_hand(ops: ModuleType, config: Config, classes: int, start: Arrays, data: Sequence[Arrays]) -> Trace:
    """Train on one of this project's backends, with the training stage's own step, in the precision of ``start``."""
    hand = begin(ops, config, classes, start, mean_picture(config))
    precision = start["conv1.w"].dtype
    data = [{**arrays, "shift": arrays["shift"].astype(precision)} for arrays in data]

    inputs = ops.upload(data[0])
    x = prepare(ops, hand.prepared, inputs)
    scores, tape = forward(ops, hand.layers, hand.parameters, x, Run(training=True))
    _, dz = ops.cross_entropy(scores, inputs["labels"])
    # Copied at once: a backend may use a gradient's memory again.
    gradients = {name: ops.to_host(g).copy() for name, g in backward(ops, hand.layers, hand.parameters, dz, tape)}

    rates = learning_rates(config, list(start), epoch=0)
    losses = []
    for number, arrays in enumerate(data):
        loss = hand.step(ops.upload({**arrays, "rates": rates, "step": np.array([number], dtype=np.uint64)}))
        losses.append(float(ops.to_host(loss).astype(np.float64).mean()))
    return Trace(np.array(losses), gradients, {name: ops.to_host(p).copy() for name, p in hand.parameters.items()})


# --- PyTorch -------------------------------------------------------------------------------------------------------


def by_torch(device: str, config: Config, start: Arrays, data: Sequence[Arrays]) -> Trace:
    """Train in plain PyTorch on ``device`` (its name there), in the precision of ``start``."""
    parameters = {name: to_torch(value, device).requires_grad_() for name, value in start.items()}
    velocities = {name: torch.zeros_like(p) for name, p in parameters.items()}
    rates = {name: _rate(config, name) for name in parameters}
    decays = {n: config.train.weight_decay if n.endswith(".w") or config.train.bias_decay else 0.0 for n in parameters}
    mean = torch.from_numpy(mean_picture(config)).permute(2, 0, 1).to(device)
    losses, first = [], {}
    for number, arrays in enumerate(data):
        batch = {name: torch.from_numpy(value).to(device) for name, value in arrays.items()}
        x = torch_input(config, mean, batch, parameters["conv1.w"].dtype)
        loss = F.cross_entropy(torch_scores(config.network, parameters, x), batch["labels"].long())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        losses.append(float(loss.detach().double()))
        if number == 0:
            first = {name: from_torch(g) for name, g in gradients.items()}
        torch_update(parameters, velocities, gradients, rates, decays, config.train.momentum)
    return Trace(np.array(losses), first, {name: from_torch(p.detach()) for name, p in parameters.items()})


def torch_update(
    parameters: Tensors,
    velocities: Tensors,
    gradients: Tensors,
    rates: dict[str, float],
    decays: dict[str, float],
    momentum: float,
) -> None:
    """The paper's update, in place: v <- m v - d lr w - lr g; w <- w + v."""
    with torch.no_grad():
        for name, w in parameters.items():
            v = velocities[name]
            v.mul_(momentum).add_(w, alpha=-decays[name] * rates[name])
            v.add_(gradients[name], alpha=-rates[name])
            w.add_(v)


def _rate(config: Config, name: str) -> float:
    """Learning rate of a parameter in epoch 0, in float32; no recipe treats conv1 differently that early."""
    rate = at_epoch(config.train.lr, 0)
    if name.endswith(".b"):
        own = at_epoch(config.train.bias_lr, 0)
        rate = rate * config.train.bias_lr_factor if own is None else own
    return float(np.float32(rate))


def to_torch(value: np.ndarray, device: str) -> torch.Tensor:
    """(KH, KW, Cin/groups, Cout) -> (Cout, Cin/groups, KH, KW); everything else as it is."""
    tensor = torch.from_numpy(value.copy()).to(device)
    return tensor.permute(3, 2, 0, 1).contiguous() if tensor.dim() == 4 else tensor


def from_torch(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.permute(2, 3, 1, 0) if tensor.dim() == 4 else tensor
    return tensor.cpu().numpy().copy()


def torch_input(
    config: Config, mean: torch.Tensor, batch: Tensors, precision: torch.dtype, *, jittered: bool = True
) -> torch.Tensor:
    """Crops -> (N, 3, height, width), on the device of ``batch`` and of ``mean`` (3, size, size).

    ``jittered`` is whether colour shifts are being drawn.
    """
    inp, crop = config.input, config.input.crop
    x = batch["images"].permute(0, 3, 1, 2).to(precision)
    if inp.mean == "image":
        places = mean.unfold(1, crop, 1).unfold(2, crop, 1)  # (3, row, column, crop, crop), a view
        row, column = batch["corner"].long().unbind(1)
        x = x - places[:, row, column].transpose(0, 1)
    x = torch.where(batch["flip"].bool()[:, None, None, None], x.flip(3), x)
    if inp.mean == "center":
        margin = (mean.shape[1] - crop) // 2
        x = x - mean[:, margin : margin + crop, margin : margin + crop]
    x = (x + batch["shift"][:, :, None, None]) * inp.scale
    if jittered and inp.jitter and inp.jitter_rescale:
        x = x / (1 + inp.jitter)
    x = x.flip(1) if inp.bgr else x
    before, after = inp.border
    return F.pad(x, (before, after, before, after))


def torch_scores(
    network: Network,
    parameters: Tensors,
    x: torch.Tensor,
    dropout: Callable[[torch.Tensor, int], torch.Tensor] = lambda x, layer: x,
) -> torch.Tensor:
    """(N, 3, height, width) -> scores (N, classes); ``dropout`` is given fc6's and fc7's output with 6 and 7."""

    def conv(x: torch.Tensor, name: str, stride: int = 1, pad: int = 0, groups: int = 1) -> torch.Tensor:
        return F.conv2d(x, parameters[f"{name}.w"], parameters[f"{name}.b"], stride, pad, groups=groups)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ parameters[f"{name}.w"] + parameters[f"{name}.b"]

    def pool(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, network.pool_size, network.pool_stride)

    def squares(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32)).square()  # under autocast x is bfloat16

    def lrn(x: torch.Tensor) -> torch.Tensor:
        n = network.lrn_size
        alpha = network.lrn_alpha / n if n and network.lrn_alpha_over_n else network.lrn_alpha
        if n == 0:
            return x
        # As a picture whose rows are the channels and whose columns the pixels, a window of channels is one of rows.
        rows = squares(x).flatten(2)
        neighbours = F.avg_pool2d(rows, (2 * (n // 2) + 1, 1), stride=1, padding=(n // 2, 0), divisor_override=1)
        neighbours = neighbours.unflatten(2, x.shape[2:])
        return x / (network.lrn_k + alpha * neighbours).pow(network.lrn_beta)

    def map_norm(x: torch.Tensor) -> torch.Tensor:
        around = F.avg_pool2d(squares(x), 5, stride=1, padding=2, divisor_override=1)
        return x / (1 + 0.001 / 25 * around).pow(0.75)

    x = conv(x, "conv1", stride=4)
    x = pool(lrn(x.relu())) if network.relu_before_lrn else pool(lrn(x)).relu()
    x = lrn(conv(x, "conv2", pad=2, groups=2).relu())
    x = pool(map_norm(x) if network.map_norm else x)
    x = conv(x, "conv3", pad=1).relu()
    x = conv(x, "conv4", pad=1, groups=2).relu()
    x = pool(conv(x, "conv5", pad=1, groups=2).relu())
    x = x.permute(0, 2, 3, 1).flatten(1)  # features in this project's order: row, column, channel
    x = dropout(linear(x, "fc6").relu(), 6)
    x = dropout(linear(x, "fc7").relu(), 7)
    x = linear(x, "fc8")
    return x.relu() if network.final_relu else x


# --- comparison ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parity:
    """Relative differences of two traces; NaN where either has one."""

    loss: float  # largest over the steps
    gradients: dict[str, float]
    parameters: dict[str, float]
    changes: dict[str, float]  # difference over the distance the parameter has moved from its start


def compare(start: Arrays, ours: Trace, theirs: Trace) -> Parity:
    """Norm of the difference over norm of PyTorch's, for each parameter."""

    def relative(difference: np.ndarray, scale: np.ndarray) -> float:
        size, error = (float(np.linalg.norm(a.astype(np.float64))) for a in (scale, difference))
        return error / size if size > 0 else error

    def each(a: Arrays, b: Arrays) -> dict[str, float]:
        return {name: relative(a[name] - b[name], b[name]) for name in start}

    moved = {
        name: relative(p - theirs.parameters[name], theirs.parameters[name] - start[name])
        for name, p in ours.parameters.items()
    }
    return Parity(
        loss=float(np.max(np.abs(ours.losses - theirs.losses) / np.abs(theirs.losses))),
        gradients=each(ours.gradients, theirs.gradients),
        parameters=each(ours.parameters, theirs.parameters),
        changes=moved,
    )


def broken(parity: Parity, start: Arrays) -> list[str]:
    """The bounds that do not hold, in words. NaN holds none."""
    checks = [("loss", parity.loss, LOSS_BOUND)]
    for name, value in start.items():
        if name.endswith(".w") or not value.any():
            checks.append((f"change of {name}", parity.changes[name], CHANGE_BOUND))
        if value.any():
            checks.append((name, parity.parameters[name], PARAMETER_BOUND))
    return [f"{what} {value:.1e}, allowed {bound:.0e}" for what, value, bound in checks if not value <= bound]


@dataclass(frozen=True)
class Measured:
    start: Arrays
    ours: Trace
    theirs: Trace
    parity: Parity


def measure(
    config: Config, device: str, classes: int, batch: int, steps: int, precision: type = np.float32, seed: int = 0
) -> Measured:
    """Run both sides from the same start on the same batches."""
    ops = backend.load(device)
    layers = network_layers(config, classes)
    drawn = initial_parameters(shapes(layers, config), config.network.weight_std, config.network.bias, seed)
    start = {name: value.astype(precision) for name, value in drawn.items()}
    data = list(batches(config, classes, batch, steps, seed))
    ours = by_hand(ops, config, classes, start, data)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    theirs = by_torch("cuda" if device == "gpu" and torch.cuda.is_available() else "cpu", config, start, data)
    return Measured(start, ours, theirs, compare(start, ours, theirs))


def main() -> int:
    parser = command("parity", __doc__)
    parser.add_argument("--device", choices=backend.DEVICES, default="cpu")
    parser.add_argument("--precision", choices=["float32", "float64"], default="float32")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=["paper", "caffe"])
    parser.add_argument("--steps", type=at_least_one, default=50)
    parser.add_argument("--batch", type=at_least_one, default=8)
    parser.add_argument("--classes", type=at_least_one, default=1000)
    parser.add_argument("--rate", type=float, help="learning rate; default 1e-5 in float32, the recipe's in float64")
    options = parser.parse_args()
    if options.precision == "float64" and options.device != "reference":
        parser.error("only --device reference computes in float64")
    rate = options.rate or (1e-5 if options.precision == "float32" else None)
    status = 0
    for recipe in options.recipes:
        config = comparable(recipe, rate)
        precision = np.dtype(options.precision).type
        measured = measure(config, options.device, options.classes, options.batch, options.steps, precision)
        ours, theirs, parity = measured.ours, measured.theirs, measured.parity
        print(
            f"{recipe}: {options.steps} steps of {options.batch} pictures, {options.classes} classes, "
            f"{options.device} beside PyTorch {torch.__version__}, {options.precision}, "
            f"learning rate {config.train.lr[0][1]:g}\n"
            f"  loss {ours.losses[0]:.6f} to {ours.losses[-1]:.6f}, "
            f"PyTorch {theirs.losses[0]:.6f} to {theirs.losses[-1]:.6f}, "
            f"largest relative difference of a step {parity.loss:.1e}\n"
            f"  {'relative difference of':24s}{'first gradient':>16s}{'parameter':>12s}{'its change':>12s}"
        )
        for name, parameter in parity.parameters.items():
            print(f"  {name:24s}{parity.gradients[name]:16.1e}{parameter:12.1e}{parity.changes[name]:12.1e}")
        for line in broken(parity, measured.start):
            print(f"  beyond its bound: {line}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
