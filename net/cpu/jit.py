"""How kernels are compiled: one place for Numba's options, and the place that imports it.

``kernel``
    a loop over ``prange`` that runs on all cores. Called from Python, **from one thread only**: the threading layer is
    Numba's ``workqueue``, the only one that every wheel brings along, and it does not bear two callers at once.
``inner``
    a function that kernels call; runs on the caller's thread.

Three habits keep kernels right and fast. *Scratch memory belongs to a task, not to a thread*: where a task needs more
than a few rows of it, ``prange`` counts the pieces of scratch and each task walks through its share of the work. No
kernel asks on which thread it runs. In inner loops an array's *last index is the plain loop variable*: Numba lets
indices count from the end, and where it cannot see that a sum such as ``at + c`` is never negative, it checks each one,
which stops the loop from becoming vector code. And *no slices per pixel*: making one costs as much as tens of
multiplications; rows are sliced, pixels are indexed.

Fast maths is switched on but for two of its liberties, ``nnan`` and ``ninf``: NaN and infinity have to pass through
every operation, or a diverged training would look healthy.

Compiled code is kept on disk. Numba's own cache looks at the file of the compiled function only, not at the functions
of other files that were inlined into it, and would go on using stale code after an update. So the folder's name holds
a hash of everything that goes into the machine code: all sources of this package, the versions of Numba and llvmlite,
and the processor. It lies in ``__pycache__`` beside the sources; in the user's cache folder where the checkout cannot
be written; in ``NUMBA_CACHE_DIR`` where that is set. The first call ever compiles, and one line on standard error says
so, because that takes up to a minute; training does it ahead, on several cores (``ahead.py``).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final


@contextmanager
def _hidden(*modules: str) -> Iterator[None]:
    """Imports of these modules fail inside the with-block, unless they have already been made."""
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


# Numba tries whether SciPy and PyYAML are there: with the one kernels could multiply matrices with `@`, the other reads
# settings from a file. Importing them takes 0.15 s at every start, for what no kernel here uses. Other modules of this
# package are loaded after this one.
with _hidden("scipy", "scipy.linalg.cython_blas", "yaml"):
    import llvmlite
    import numba
    import numba.np.arraymath
    from llvmlite import binding
    from numba import prange
    from numba.core import codegen, event

__all__ = ["FOLDER", "cache_folder", "cache_name", "inner", "kernel", "prange"]

numba.config.THREADING_LAYER = "workqueue"

_HERE: Final = Path(__file__).resolve().parent
_FASTMATH: Final = {"nsz", "arcp", "contract", "afn", "reassoc"}


def processor() -> tuple[str, str]:
    """Name and features of the processor that Numba compiles for: this one, unless its settings name another."""
    name, features = numba.config.CPU_NAME, numba.config.CPU_FEATURES
    return name or binding.get_host_cpu_name(), codegen.get_host_cpu_features() if features is None else features


def cache_name(sources: Path) -> str:
    """``kernels-<where>-<what>``: where is this processor and this folder of sources, what is their contents' hash."""
    where = hashlib.sha256(f"{' '.join(processor())} {sources}".encode()).hexdigest()
    what = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version}".encode())
    for path in sorted(sources.glob("*.py")):
        what.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"kernels-{where[:12]}-{what.hexdigest()[:16]}"


def cache_folder(sources: Path) -> Path | None:
    """The folder for compiled kernels, made where it is not there; None where none of the places can be written.

    What an older version of the same sources left for the same processor is removed.
    """
    name = cache_name(sources)
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alexnet-by-hand"
    given = [Path(numba.config.CACHE_DIR)] if numba.config.CACHE_DIR else []
    for place in (*given, sources / "__pycache__", user):
        folder = place / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # a folder that is there may still not be ours to write
        except OSError:
            continue
        for old in place.glob(name[: name.rindex("-")] + "-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        return folder
    return None


FOLDER: Final = cache_folder(_HERE)
if FOLDER is None:
    print("no folder to keep compiled kernels in; set NUMBA_CACHE_DIR to one that can be written", file=sys.stderr)


def _compiler(kept: bool, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    def compiled(function: Callable[..., Any]) -> Any:
        # Numba reads its setting when a function is decorated; other users of Numba in this process keep theirs.
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = "" if FOLDER is None else str(FOLDER)
        try:
            return numba.njit(
                cache=kept and FOLDER is not None, nogil=True, fastmath=_FASTMATH, error_model="numpy", **options
            )(function)
        finally:
            numba.config.CACHE_DIR = before

    return compiled


# Always inlined: as a function of its own, an inner one exists twice in a process that has just compiled it, optimised
# alone and within its kernel, and the linker takes the first; a process that loads the kernel from the cache has only
# the second. Fast maths lets the two differ in the last bit. Kernels hold all of it, so it is not kept by itself; and
# nobody calls it from Python or C, where wrappers would hold it two more times.
inner = _compiler(kept=False, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
kernel = _compiler(kept=True, parallel=True, no_cfunc_wrapper=True)


class _Announce(event.Listener):
    """Says once that kernels are being compiled. Loading them from the cache is not compiling."""

    def __init__(self) -> None:
        self._said = False

    def on_start(self, event: Any) -> None:
        # Numba compiles for everybody in this process; only this package's kernels are worth a line.
        if event.data["dispatcher"].py_func.__module__.startswith("net.cpu"):
            self.say()

    def say(self) -> None:
        if not self._said:
            self._said = True
            print(
                "compiling CPU kernels for this machine (kept for next time), up to a minute",
                file=sys.stderr,
                flush=True,
            )

    def on_end(self, event: Any) -> None:
        pass


_announcement = _Announce()
announce = _announcement.say
event.register("numba:compile", _announcement)
