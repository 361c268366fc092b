"""How kernels are compiled: one place for Numba's options.

``kernel``
    a loop over ``prange`` that runs on all cores. Called from Python, **from one thread only**: the threading layer is
    Numba's ``workqueue``, the only one that every wheel brings along, and it does not bear two callers at once.
``inner``
    a function that kernels call; runs on the caller's thread.

Two habits keep inner loops fast. Their array's *last index is the plain loop variable*: Numba lets indices count from
the end, and where it cannot see that a sum such as ``at + c`` is never negative, it checks each one, which stops the
loop from becoming vector code. And *no slices per pixel*: making one costs as much as tens of multiplications; rows are
sliced, pixels are indexed.

Fast maths is switched on but for two of its liberties, ``nnan`` and ``ninf``: NaN and infinity have to pass through
every operation, or a diverged training would look healthy.

Compiled code is cached on disk beside the sources. The first call ever compiles, and one line on standard error says
so, because that takes up to a minute.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import numba
from numba.core import event

numba.config.THREADING_LAYER = "workqueue"

_FASTMATH: Final = {"nsz", "arcp", "contract", "afn", "reassoc"}

inner = numba.njit(cache=True, nogil=True, fastmath=_FASTMATH, error_model="numpy")
kernel = numba.njit(cache=True, nogil=True, fastmath=_FASTMATH, error_model="numpy", parallel=True)


class _Announce(event.Listener):
    """Says once that kernels are being compiled. Loading them from the cache is not compiling."""

    def __init__(self) -> None:
        self._said = False

    def on_start(self, event: Any) -> None:
        # Numba compiles for everybody in this process; only this package's kernels are worth a line.
        function = event.data["dispatcher"].py_func
        if not self._said and function.__module__.startswith("net.cpu"):
            self._said = True
            print("compiling the CPU kernels for this machine, once; under a minute", file=sys.stderr, flush=True)

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Announce())
