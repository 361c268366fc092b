"""The kernels of a training step compiled before the first step, on several cores.

Left to their first call, the kernels would be compiled one after another on one core, a minute of it. So the first
training on a machine compiles them by calling each operation on arrays of a few pixels: sizes do not matter to a
compiled kernel, types do. :data:`PARTS` divides the operations among helpers, processes that live as long as that
takes; no kernel belongs to two parts. What they have compiled, this process then loads from the folder of compiled
kernels, as every later one does: code that a process has compiled itself may round otherwise in the last bit, and a
resumed run must have the bits of its first part. A file there says that all is done, and later starts look no further.

Gain: all compiling from 58 to 30 s with two processes in place of one (docs/cpu.md, "Start").
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

import numba
import numpy as np

from net.cpu import augment, conv, dropout, finish, jit, linear, lrn, map_norm, pool, relu, update
from net.cpu.memory import asarray, empty
from net.cpu.simd import PANEL

_LRN: Final = (5, 2.0, 1e-4, 0.75)
_POOL: Final = (3, 2)


def warm_up() -> None:
    """Start Numba, which takes a quarter of a second; compile a training step's kernels if that was never done.

    Processes that begin together wait for the first of them.
    """
    if jit.FOLDER is None:  # helpers could not hand over what they compile
        update.start()
        return
    done = jit.FOLDER / "all"
    if not done.exists():
        with open(jit.FOLDER / "lock", "w") as file:
            with contextlib.suppress(OSError):  # without locks on this file system, each compiles for itself
                fcntl.flock(file, fcntl.LOCK_EX)
            if not done.exists() and _compile_parts():
                done.touch()
    update.start()


def _compile_parts() -> bool:
    """Compile all parts on as many cores as there are; False where a helper failed and its part is left to be done."""
    processes = min(len(PARTS), numba.get_num_threads())
    with contextlib.ExitStack() as helpers:
        jit.announce()
        started = [helpers.enter_context(_helper(range(n, len(PARTS), processes))) for n in range(processes)]
        ended_well = [_ended_well(*helper) for helper in started]
    return all(ended_well)


@contextlib.contextmanager
def _helper(parts: range) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A process that compiles these parts and ends with the with-block at the latest, and what it says."""
    # -P: without it the current folder comes first, and a `net` of the user's own there in place of ours.
    command = [sys.executable, "-P", "-c", f"from net.cpu import ahead; ahead.help_out({list(parts)})"]
    root = str(Path(__file__).resolve().parents[2])
    # Packages may come from there, as on clusters; an empty entry would be the current folder.
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            yield process, said
        finally:
            process.kill()
            process.wait()


def help_out(parts: list[int]) -> None:
    """Compile these parts, as a helper's only work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all its processes; who started us decides
    for part in parts:
        PARTS[part]()


def _ended_well(process: subprocess.Popen[bytes], said: IO[bytes]) -> bool:
    if process.wait() == 0:
        return True
    said.seek(0)
    last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
    print(
        f"note: a helper that compiles CPU kernels ended with status {process.returncode} ({last[:200]}); "
        "what it left is compiled when it is needed, and a resumed run may then differ in the last bits",
        file=sys.stderr,
    )
    return False


def _zeros(*shape: int) -> np.ndarray:
    return asarray(np.zeros(shape, np.float32))


def _forward_convolution() -> None:
    w, b = _zeros(3, 3, PANEL, PANEL), _zeros(PANEL)  # maps fill whole panels, or one picture would be for one core
    for images in (2, 1):
        x = _zeros(images, 6, 6, PANEL)
        conv.conv_block_forward(x, w, b, stride=1, pad=1, groups=1, lrn=_LRN, pool=_POOL, training=True)


def _convolution_gradient() -> None:
    for maps in (16, 128):  # few sums, and more than stay in a cache
        x, w, dy = _zeros(2, 6, 6, maps), _zeros(3, 3, maps, maps), _zeros(2, 6, 6, maps)
        conv.conv2d_backward(dy, x, w, stride=1, pad=1, groups=1, need_dx=False)


def _pixels() -> None:
    y, dpooled, winner = _zeros(2, 5, 5, 16), _zeros(2, 2, 2, 16), empty((2, 2, 2, 16), np.uint8)
    winner[:] = 0
    finish.unfinish(dpooled, y, winner, finish.block(_LRN, _POOL))
    crops, corner, flip = np.zeros((2, 5, 5, 3), np.uint8), np.zeros((2, 2), np.int32), np.zeros(2, np.uint8)
    augment.augment(crops, corner, flip, _zeros(2, 3), mean=_zeros(5, 5, 3), scale=1.0, bgr=False, border=(0, 0))
    dropout.dropout_forward(_zeros(2, 3), keep=0.5, scale=1.0, key=(0, 0, 0))


def _fully_connected() -> None:
    x, w, b = _zeros(8, 16), _zeros(16, 16), _zeros(16)
    _, kept = linear.linear_block_forward(x, w, b, training=True)
    _, dw, _ = linear.linear_block_backward(_zeros(8, 16), kept, w, need_dx=True)
    dw.descend(w.reshape(-1), _zeros(w.size), *[np.float32(0)] * 3)
    np.asarray(dw)  # as processes that add up their gradients need it
    linear.linear_forward(_zeros(1, 16), w, b)  # few pictures, as an epoch's last batch may have
    update.start()


def _layers_of_original() -> None:
    """What the blocks of other recipes hold is single layers where their order is another."""
    size, k, alpha, beta = _LRN
    x = _zeros(2, 6, 6, 16)
    for forward, backward in (
        (lrn.lrn_forward, lrn.lrn_backward),
        (map_norm.map_norm_forward, map_norm.map_norm_backward),
    ):
        y, s = forward(x, size=size, k=k, alpha=alpha, beta=beta)
        backward(y, x, s, size=size, alpha=alpha, beta=beta)
    size, stride = _POOL
    y, winner = pool.maxpool_forward(x, size=size, stride=stride)
    pool.maxpool_backward(y, winner, height=6, width=6, size=size, stride=stride)
    relu.relu_backward(x, relu.relu_forward(x))


# In this order two processes, every other part each, have about as much to do.
PARTS: Final[tuple[Callable[[], None], ...]] = (
    _convolution_gradient,
    _forward_convolution,
    _fully_connected,
    _pixels,
    _layers_of_original,
)
