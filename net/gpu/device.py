"""The GPU in use: what ``net.gpu.setup`` has set up once, for all that compute on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Device:
    """The module ``cupy``, the stream that everything is queued on, the card, and the arithmetic."""

    cupy: Any
    stream: Any
    name: str
    capability: int  # 80 for compute capability 8.0
    memory: int  # bytes on the device
    processors: int  # multiprocessors (SMs)
    shared_processor: int  # bytes of shared memory of each
    precision: str  # "fp32", "tf32" or "bf16": of the matrix products
    storage: str  # dtype of pictures between layers: "float32", or "uint16" that holds the bits of bfloat16


_device: Device | None = None


def use(device: Device) -> None:
    """Compute on this device from now on."""
    global _device
    _device = device


def started() -> bool:
    """Whether there is one."""
    return _device is not None


def current() -> Device:
    """The device that ``net.gpu.setup.start`` set up."""
    if _device is None:
        raise RuntimeError("the GPU backend has not been started; use net.backend.load('gpu', precision)")
    return _device


def event_on(stream: Any) -> Any:
    """An event that comes when all that is queued on the stream now has been done."""
    event = current().cupy.cuda.Event(disable_timing=True)
    event.record(stream)
    return event


def card() -> str:
    """The card that computes: its name and memory, and, where this process sees several, that it is the first."""
    device = current()
    count = device.cupy.cuda.runtime.getDeviceCount()
    which = f", the first of {count}; CUDA_VISIBLE_DEVICES chooses another" if count > 1 else ""
    return f"{device.name}, {device.memory / 2**30:.0f} GiB{which}"


def describe() -> str:
    """One line for the log: the card and the arithmetic."""
    device = current()
    arithmetic = {
        "fp32": "float32",
        "tf32": "TF32 tensor cores, float32 sums and weights",
        "bf16": "bfloat16 tensor cores and pictures, float32 sums, statistics and weights",
    }[device.precision]
    return f"{card()}: {device.precision} ({arithmetic})"
