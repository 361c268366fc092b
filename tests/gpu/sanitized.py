"""Run by ``test_sanitizers.py`` in a Python of its own, under the address or the thread sanitizer."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np

from net.backend import load
from net.gpu import kernels
from tests.gpu import standin, test_blocks, test_implicit
from tests.net import cases

# Under the thread sanitizer every CUDA thread is a thread of the system: only kernels that share memory, in small.
SHARING = ("softmax", "cross_entropy", "linear_backward")
RACES_BLOCKS = ("odd maps", "4 maps")


def everything() -> None:
    with standin.installed():
        card()


def card() -> None:
    """All kernels on small inputs: on a real GPU under compute-sanitizer (``python -m bench.gpu --sanitize``)."""
    for precision in ("fp32", "bf16"):
        ops = load("gpu", precision)
        for case in cases.ALL:
            if not case.layer and (precision == "fp32" or case.operation.startswith(("conv", "linear", "augment"))):
                cases.run(ops, case)
        for block in test_blocks.BLOCKS[1:]:
            x, w, b, dy = (ops.asarray(a) for a in test_blocks.draw(block))
            forward, backward = test_blocks.operations(ops, block)
            _, kept = forward(x, w, b, **test_blocks.options(block), training=True)
            backward(dy, kept, w, **test_blocks.options(block), need_dx=True)
        for implicit in test_implicit.SMALL if precision == "bf16" else ():
            _convolve(ops, implicit)
        ops.synchronize()


def _convolve(ops: ModuleType, case: test_implicit.Case) -> None:
    x, w, b, dy = (ops.asarray(a) for a in test_implicit.draw(case))
    ops.conv2d_forward(x, w, b, **case.geometry)
    ops.conv2d_backward(dy, x, w, **case.geometry, need_dx=True)


def races() -> None:
    with standin.installed():
        ops = load("gpu", "fp32")
        for operation in SHARING:
            cases.run(ops, next(c for c in cases.ALL if c.operation == operation))
        for block in test_blocks.BLOCKS:
            if block.name in RACES_BLOCKS:
                x, w, b, dy = (ops.asarray(a) for a in test_blocks.draw(block))
                _, kept = ops.conv_block_forward(x, w, b, **test_blocks.options(block), training=True)
                ops.conv_block_backward(dy, kept, w, **test_blocks.options(block), need_dx=False)
        # On Hopper's way: the other takes hours of exchanges between threads.
        _convolve(load("gpu", "bf16"), test_implicit.SMALL[0])


def broken(file: str, old: str, new: str) -> None:
    """Change the text of one file before anything runs."""
    original = kernels.source

    def source(name: str) -> str:
        text = original(name)
        if name == file:
            assert old in text
            text = text.replace(old, new)
        return text

    kernels.source = source  # type: ignore[assignment]


if __name__ == "__main__":
    np.seterr(all="ignore")
    job, *change = sys.argv[1:]
    if change:
        broken(*(text.encode().decode("unicode_escape") for text in change))
    {"everything": everything, "races": races, "card": card}[job]()
    print("done")
