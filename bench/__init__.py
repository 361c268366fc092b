"""Benchmarks, each side by side with its peer in one run.

What they cannot work with is told in a sentence, as ``run_pipeline.py`` does it.
"""

from __future__ import annotations

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
