"""What the first author tried: "I changed every numpy function into cupy and it became slower."

The reference backend's own text with another module's name in the place of numpy's in its imports, and nothing else.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import net.reference

PACKAGE = "bench_naive_reference"


def load(array_module: str) -> ModuleType:
    """The reference backend on ``array_module``, "cupy" (or "numpy", to try this out)."""
    folder = Path(net.reference.__file__).parent
    package = ModuleType(PACKAGE)
    package.__path__ = []  # type: ignore[attr-defined]
    sys.modules[PACKAGE] = package
    names = sorted((p.stem for p in folder.glob("*.py") if p.stem != "__init__"), key=_imports_first(folder))
    for name in names:
        _execute(folder / f"{name}.py", f"{PACKAGE}.{name}", array_module)
    _execute(folder / "__init__.py", PACKAGE, array_module)
    arrays = importlib.import_module(array_module)
    # The two functions that must differ: the way to the device and back.
    package.asarray = lambda a: arrays.asarray(a)  # type: ignore[attr-defined]
    package.upload = lambda batch: {k: arrays.asarray(a) for k, a in batch.items()}  # type: ignore[attr-defined]
    package.to_host = lambda a: a.get() if hasattr(a, "get") else a  # type: ignore[attr-defined]
    return package


def _imports_first(folder: Path) -> Any:
    """Sort key: a module after those of its own package that it imports."""

    def depth(name: str) -> int:
        text = (folder / f"{name}.py").read_text()
        used = [p.stem for p in folder.glob("*.py") if f"net.reference.{p.stem} import" in text and p.stem != name]
        return 1 + max((depth(u) for u in used), default=0)

    return depth


def _execute(path: Path, name: str, array_module: str) -> None:
    text = changed(path.read_text(), array_module)
    module = sys.modules.get(name) or ModuleType(name)
    sys.modules[name] = module
    code = compile(text.replace("net.reference", PACKAGE), str(path), "exec")
    exec(code, module.__dict__)  # noqa: S102


def changed(text: str, array_module: str) -> str:
    """The text with ``array_module`` for numpy; numpy.typing, which computes nothing, stays."""
    text = text.replace("import numpy as np", f"import {array_module} as np")
    return text.replace("from numpy.lib.", f"from {array_module}.lib.")  # NumPy's own refuses arrays of CuPy
