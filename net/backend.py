"""The operations a backend must offer, and how one is chosen.

A backend is a module of plain functions over its own arrays: ``net.reference`` (NumPy, the textbook that the others are
tested against), ``net.cpu`` (Numba and BLAS), ``net.gpu`` (CuPy, CUDA and cuBLAS). All three have the same functions
with the same parameters; :func:`load` refuses a module that lacks one. No backend is silently replaced by another.

Arrays are float32 in NHWC order (image, row, column, channel); convolution weights are (KH, KW, Cin/groups, Cout),
fully connected weights (Cin, Cout). Gradients overwrite, they never add. Arguments are not modified, except by
``sgd_update``. What stands for the gradient of weights may be something that ``sgd_update`` computes while it uses it,
as long as ``to_host`` makes an array of it.

Three values change from step to step of a training run: the learning rate, the step number in a dropout key, and
dropout's ``first``, the place of the first row in the whole batch, which is not 0 where several processes share a
batch. Each may be given as a Python number or as an array of one element that lives on the backend's device, so that a
recorded step can be replayed with other values.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Final

OPERATIONS: Final[dict[str, tuple[str, ...]]] = {
    # Moving data. `upload` takes a dictionary of host arrays (a loader's slot) and returns the same names as device
    # arrays; when it returns, the host arrays may be overwritten. `host_empty` gives the loader its buffers (pinned
    # memory on a GPU). `synchronize` waits until everything queued on the device has been done.
    "asarray": ("a",),
    "to_host": ("a",),
    "empty": ("shape", "dtype"),
    "host_empty": ("shape", "dtype"),
    "upload": ("arrays",),
    "synchronize": (),
    # From uint8 crops to the network's input: ((pixel - mean + shift) * scale), flipped, zero-bordered.
    "augment": ("images", "corner", "flip", "shift", "mean", "scale", "bgr", "border"),
    # The network's layers, forward and backward.
    "conv2d_forward": ("x", "w", "b", "stride", "pad", "groups"),
    "conv2d_backward": ("dy", "x", "w", "stride", "pad", "groups", "need_dx"),
    "relu_forward": ("x",),
    "relu_backward": ("dy", "y"),
    "lrn_forward": ("x", "size", "k", "alpha", "beta"),
    "lrn_backward": ("dy", "x", "s", "size", "alpha", "beta"),
    "map_norm_forward": ("x", "size", "k", "alpha", "beta"),
    "map_norm_backward": ("dy", "x", "s", "size", "alpha", "beta"),
    "maxpool_forward": ("x", "size", "stride"),
    "maxpool_backward": ("dy", "winner", "height", "width", "size", "stride"),
    "linear_forward": ("x", "w", "b"),
    "linear_backward": ("dy", "x", "w", "need_dx"),
    "dropout_forward": ("x", "keep", "scale", "key", "first"),
    "dropout_backward": ("dy", "keep", "scale", "key", "first"),
    # Loss and update.
    "softmax": ("z",),
    "cross_entropy": ("z", "labels"),
    "sgd_update": ("w", "v", "dw", "lr", "momentum", "decay"),
}

# A backend may offer these as well; the network then uses them in place of the sequence each stands for.
# `lrn` is None or (size, k, alpha, beta); `pool` is None or (size, stride); `training` False means that no backward
# pass will follow, so `kept` may be None. `kept` is the backend's own affair; the backward pass may use it up.
FUSED_OPERATIONS: Final[dict[str, tuple[str, ...]]] = {
    # convolution, bias, ReLU [, LRN] [, max pool]  ->  y, kept
    "conv_block_forward": ("x", "w", "b", "stride", "pad", "groups", "lrn", "pool", "training"),
    "conv_block_backward": ("dy", "kept", "w", "stride", "pad", "groups", "lrn", "pool", "need_dx"),
    # convolution, bias [, LRN] [, max pool], ReLU (block 1 of the authors' code)  ->  y, kept
    "conv_block_relu_last_forward": ("x", "w", "b", "stride", "pad", "groups", "lrn", "pool", "training"),
    "conv_block_relu_last_backward": ("dy", "kept", "w", "stride", "pad", "groups", "lrn", "pool", "need_dx"),
    # linear, bias, ReLU  ->  y, kept
    "linear_block_forward": ("x", "w", "b", "training"),
    "linear_block_backward": ("dy", "kept", "w", "need_dx"),
    # the same parameters in a form that forward passes without training use faster; whatever is derived from them may
    # be kept until the next `sgd_update`, and must not outlive it
    "fixed": ("parameters",),
    # what the first call of any operation would have to do besides; may run beside work that calls none
    "warm_up": (),
    # a host array that nobody else will use, as a device array: itself where the device can compute with it as it is
    "adopt": ("a",),
    # record a step once, replay it afterwards
    "replayable": ("function",),
    # refuse, before anything is allocated, a batch that the device has no memory for
    "check_memory": ("layers", "shape", "batch", "training", "views"),
    # gradients, as the backward pass hands them out, to their sums over the processes that share a batch
    "reduction": ("rank", "size", "broadcast"),
}

DEVICES: Final = ("reference", "cpu", "gpu")


class BackendUnavailableError(RuntimeError):
    """A backend cannot run on this machine; the message says why and what mends it."""


def choose(device: str) -> tuple[str, str]:
    """Resolve ``auto``: the GPU where one works, else the CPU; returns the device and why it was chosen."""
    if device != "auto":
        return device, "as asked"
    reason = importlib.import_module("net.gpu.setup").availability()
    return ("gpu", "a GPU works here") if reason is None else ("cpu", reason)


def load(device: str, precision: str = "fp32") -> ModuleType:
    """Import the backend ``device`` and check that it is complete.

    Parameters
    ----------
    device : {"reference", "cpu", "gpu"}
    precision : {"fp32", "tf32", "bf16"}
        Arithmetic of the matrix products. Only the GPU knows others than fp32.

    Raises
    ------
    ValueError
        There is no such device.
    BackendUnavailableError
        The machine cannot run it (no driver, a missing package, a precision it does not have), or an operation is
        missing.
    """
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; choose one of {', '.join(DEVICES)}")
    if device != "gpu" and precision != "fp32":
        raise BackendUnavailableError(
            f"the {device} backend computes in fp32 only; leave out --precision {precision} or use --device gpu"
        )
    backend = importlib.import_module(f"net.{device}")
    missing = [name for name in OPERATIONS if not callable(getattr(backend, name, None))]
    if missing:
        raise BackendUnavailableError(f"net.{device} lacks {', '.join(missing)}")
    if device == "gpu":
        backend.start(precision)
    return backend
