"""Count a process's changes to a run directory, and kill it with SIGKILL at one of them.

Python imports a module of this name at its start where it finds one; tests/crash/kills.py puts this folder into
PYTHONPATH. What counts: a file just opened to write (it is there and still empty), and the moment before a folder is
opened (to flush it), made or removed, or a file renamed or removed. Only the pipeline's own process counts, not its
workers.
"""

from __future__ import annotations

import atexit
import builtins
import os
import signal
import sys
from typing import Any

_BELOW = os.environ.get("CRASH_BELOW", "")
_AT = os.environ.get("CRASH_AT", "")  # the number of a change, or the name of the file that is changed
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
_real_open = builtins.open
_done = 0


def _count(path: object) -> None:
    global _done
    if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(_BELOW):
        return
    _done += 1
    if _AT in (str(_done), os.path.basename(path)):
        if os.environ["CRASH_GROUP"] == "1":
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    # An opening without a mode is one by os.open(), with which folders are flushed.
    if event in _CHANGES or (event == "open" and arguments[1] is None):
        _count(arguments[0])


def _open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
    opened = _real_open(file, mode, *arguments, **options)
    if set(mode) & set("wxa+"):
        _count(file)
    return opened


def _write_count() -> None:
    with _real_open(os.environ["CRASH_COUNT"], "w") as file:
        file.write(str(_done))


if _BELOW and "run_pipeline.py" in sys.orig_argv:
    sys.addaudithook(_audit)
    builtins.open = _open
    if "CRASH_COUNT" in os.environ:
        atexit.register(_write_count)
