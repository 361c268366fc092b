"""The same network and step in PyTorch, in the ways its users run it: the yardstick of ``bench.gpu``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

Host = dict[str, np.ndarray]


class AlexNet(nn.Module):
    """``net.alexnet.alexnet()`` with the paper's options: two groups in conv2, 4 and 5, LRN over five channels."""

    def __init__(self, classes: int, features: int, keep: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 11, stride=4)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=2)
        self.fc6 = nn.Linear(features, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, classes)
        self.dropped = 1 - keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _pool(_lrn(functional.relu(self.conv1(x))))
        x = _pool(_lrn(functional.relu(self.conv2(x))))
        x = functional.relu(self.conv3(x))
        x = functional.relu(self.conv4(x))
        x = _pool(functional.relu(self.conv5(x)))
        x = x.permute(0, 2, 3, 1).flatten(1)  # height, width, channels, as our fc6 has them
        x = functional.dropout(functional.relu(self.fc6(x)), self.dropped, self.training)
        x = functional.dropout(functional.relu(self.fc7(x)), self.dropped, self.training)
        return self.fc8(x)

    def load(self, parameters: Host) -> None:
        """Our parameters: weights (KH, KW, Cin/groups, Cout) and (D, K)."""
        with torch.no_grad():
            for name, value in parameters.items():
                layer, kind = name.split(".")
                order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
                target = getattr(self, layer).weight if kind == "w" else getattr(self, layer).bias
                target.copy_(torch.from_numpy(np.ascontiguousarray(value.transpose(order))))


def _lrn(x: torch.Tensor) -> torch.Tensor:
    return functional.local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2.0)  # PyTorch divides alpha by the size


def _pool(x: torch.Tensor) -> torch.Tensor:
    return functional.max_pool2d(x, 3, 2)


@dataclass(frozen=True)
class Mode:
    """One way to run it."""

    name: str
    compiled: str | None = None  # mode of torch.compile
    channels_last: bool = False


MODES = (
    Mode("eager"),
    Mode("eager, channels_last", channels_last=True),
    Mode("compile, channels_last", compiled="default", channels_last=True),
    Mode("compile with CUDA graphs, channels_last", compiled="reduce-overhead", channels_last=True),
)


def training(
    mode: Mode, precision: str, device: str, parameters: Host, classes: int, keep: float, scale: float
) -> Callable[[Host], Any]:
    """A function that starts one training step of a batch in host memory and returns the losses on the device."""
    network = _network(mode, device, parameters, classes, keep).train()
    fused = device == "cuda"
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=fused)

    def forward(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with _arithmetic(precision, device):
            z = network(_prepare(inputs, scale, mode.channels_last))
        return functional.cross_entropy(z.float(), inputs["labels"], reduction="none")

    run = _compiled(forward, mode)

    def step(batch: Host) -> torch.Tensor:
        inputs = _upload(batch, device)
        optimiser.param_groups[0]["lr"] = float(batch["rates"][0])
        optimiser.zero_grad(set_to_none=True)
        loss = run(inputs)
        loss.mean().backward()
        optimiser.step()
        return loss.detach().clone()

    return step


def prediction(
    mode: Mode, precision: str, device: str, parameters: Host, classes: int, scale: float, views: int
) -> Callable[[Host], Any]:
    """A function from crops in host memory to probabilities averaged over the views of a picture."""
    network = _network(mode, device, parameters, classes, 1.0).eval()

    def forward(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with _arithmetic(precision, device):
            z = network(_prepare(inputs, scale, mode.channels_last))
        return functional.softmax(z.float(), 1).unflatten(0, (-1, views)).mean(1)

    run = _compiled(forward, mode)

    @torch.no_grad()
    def predict(batch: Host) -> torch.Tensor:
        return run(_upload(batch, device)).clone()

    return predict


def set_tf32(precision: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True


def _network(mode: Mode, device: str, parameters: Host, classes: int, keep: float) -> AlexNet:
    network = AlexNet(classes, parameters["fc6.w"].shape[0], keep)
    network.load(parameters)
    network = network.to(device)
    return network.to(memory_format=torch.channels_last) if mode.channels_last else network


def _arithmetic(precision: str, device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()


def _upload(batch: Host, device: str) -> dict[str, torch.Tensor]:
    """The batch on the device. As with ours, copies from pinned memory run on a stream beside the step before."""
    host = {name: torch.from_numpy(batch[name]) for name in ("images", "flip", "shift", "labels") if name in batch}
    if "labels" in host:
        host["labels"] = host["labels"].long()
    if device == "cpu":
        return host
    copying, computing = _copying(), torch.cuda.current_stream()
    with torch.cuda.stream(copying):
        tensors = {name: a.to(device, non_blocking=True) for name, a in host.items()}
    computing.wait_stream(copying)
    for tensor in tensors.values():
        tensor.record_stream(computing)
    return tensors


@cache
def _copying() -> Any:
    return torch.cuda.Stream()


def _compiled(function: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
    """Compiled for the very shapes given: PyTorch would else turn to a slower general form at the second batch size,
    and after eight versions of one function to none at all."""
    if mode.compiled is None:
        return function
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, mode=mode.compiled, dynamic=False, fullgraph=True)


def _prepare(inputs: dict[str, torch.Tensor], scale: float, channels_last: bool) -> torch.Tensor:
    """uint8 crops -> jittered, scaled, mirrored, bordered pictures, as our ``augment``."""
    x = (inputs["images"].float() + inputs["shift"][:, None, None, :]) * scale
    x = torch.where(inputs["flip"].bool()[:, None, None, None], x.flip(2), x)
    x = functional.pad(x, (0, 0, 2, 1, 2, 1)).permute(0, 3, 1, 2)
    return x if channels_last else x.contiguous()
