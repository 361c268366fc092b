"""Benchmarks, each beside its peer in one run. ``python -m bench.NAME --help`` says what NAME does and needs.

On the CPU, beside PyTorch (``pip install ".[bench]"``) but for the last three:

    cpu               training, evaluation, memory, start and one picture: the table of docs/results.md
    cpu_error         how exactly each layer rounds, against float64
    cpu_curves        the losses of a training, step by step
    parity            gradients, losses and parameters of the same steps, on any backend
    cpu_layers        where a training step's time goes, by operation
    cpu_small         the smaller operations beside net/reference
    kernels           each operation from naive to fast, step by step

The data path:

    data              preprocessing, loading, memory, waiting, sets larger than memory; beside Pillow, PyTorch, dd
    full_size         everything but the pictures at the size of ILSVRC-2012

On a GPU (docs/gpu.md has the order for someone who has a card for half an hour):

    gpu               training and evaluation beside PyTorch; every kernel's time; resuming; the loader
    gpu_convolution   the five convolutions, by three ways each
    gpu_model         the predicted time of every kernel; needs no GPU

What it learns, on several machines, and what a full run takes:

    evidence          the recipes, their ablations and the same in PyTorch on photographs: docs/evidence.md
    scaling           several processes; ``--model`` predicts several GPUs
    full_run          hours and euros of 90 epochs of ILSVRC-2012

The other files are parts of these: ``cpu_sides`` and ``evidence_torch`` are processes that ``cpu`` and ``evidence``
start; ``hand``, ``blotches``, ``gpu_torch``, ``gpu_naive``, ``gpu_checks``, ``evidence_plan`` and ``evidence_tables``
are imported.

What a command cannot work with is told in a sentence, as ``run_pipeline.py`` does it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from subprocess import CalledProcessError
from types import TracebackType
from typing import Final

from pipeline.errors import PipelineError

_EXTRAS: Final = {"torch": "bench", "simplejpeg": "bench", "mpi4py": "cluster", "threadpoolctl": "cluster"}


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    match error:
        case ModuleNotFoundError(name=str(name)) if name in _EXTRAS:
            sentence = f"{name} is not installed: python -m pip install '.[{_EXTRAS[name]}]'"
        case PipelineError():
            sentence = str(error)
        case CalledProcessError(cmd=list(command), stderr=None):  # else nobody has seen what it said
            status = error.returncode  # below zero after a signal, which leaves no reason above
            how = f"with status {status}, for the reason above" if status > 0 else f"by signal {-status}"
            sentence = f"ended {how}: {shlex.join(map(str, command))}"
        case _:
            sys.__excepthook__(kind, error, trace)
            return
    print(f"error: {sentence}", file=sys.stderr)


sys.excepthook = _tell


def command(name: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of ``python -m bench.NAME``, whose ``--help`` begins with the module's own text."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
