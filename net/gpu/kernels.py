"""From the .cu files of this folder to kernels that can be called.

Each file is compiled when one of its kernels is first used, once with float as the type of activations and once, where
asked for, with bfloat16 (``-DBF16``). CuPy keeps compiled kernels on disk, keyed by the text; ``common.cuh`` is put
in front of the text, so a change there counts.

CuPy checks neither the number nor the types of a kernel's arguments (a Python float would arrive as 64 bits where 32
are read), so :func:`launch` reads each kernel's parameters from its source and converts or refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from net.gpu.device import current

FOLDER: Final = Path(__file__).parent
THREADS: Final = 256  # threads a block, as in common.cuh
OPTIONS: Final = ("--std=c++17",)

_KERNEL: Final = re.compile(r'extern "C" __global__ void __launch_bounds__\([\w, ]+\) (\w+)\(([^)]*)\)')
_SCALARS: Final = {
    "int": np.int32,
    "float": np.float32,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "long long": np.int64,
}
_POINTERS: Final = {
    "float": "float32",
    "int": "int32",
    "uint8": "uint8",
    "uint32": "uint32",
}


def sources() -> list[str]:
    """Names of the CUDA files, without suffix."""
    return sorted(path.stem for path in FOLDER.glob("*.cu"))


@cache
def source(file: str) -> str:
    """The full text of one CUDA file, with what all share in front."""
    return (FOLDER / "common.cuh").read_text() + (FOLDER / f"{file}.cu").read_text()


@cache
def signatures() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Each kernel's file and the types of its parameters, such as ``("const real*", "int")``."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for file in sources():
        for name, parameters in _KERNEL.findall(source(file)):
            types = tuple(" ".join(p.split()[:-1]) for p in parameters.split(","))
            found[name] = (file, types)
    return found


def launch(
    name: str, grid: tuple[int, ...], args: Sequence[Any], *, dtype: Any, block: int = THREADS, shared: int = 0
) -> None:
    """Queue a kernel. ``dtype`` is that of its ``real`` arrays: float32, or uint16 for bfloat16.

    Arrays must be C-contiguous and of the type the kernel's source names; None is a null pointer. Numbers are
    converted. Nothing is queued where the grid is empty.

    Raises
    ------
    TypeError
        An argument does not fit the kernel's parameter.
    """
    if 0 in grid:
        return
    file, real, parameters = _prepared(name, np.dtype(dtype))
    if len(args) != len(parameters):
        raise TypeError(f"{name} takes {len(parameters)} arguments, not {len(args)}")
    converted = tuple(fit(arg) for fit, arg in zip(parameters, args, strict=True))
    kernel = compiled(file, name, real)
    if shared > 48 * 1024 and kernel.max_dynamic_shared_size_bytes < shared:
        kernel.max_dynamic_shared_size_bytes = shared
    kernel(grid, (block,), converted, shared_mem=shared)


@cache
def _prepared(name: str, dtype: np.dtype[Any]) -> tuple[str, str, tuple[Callable[[Any], Any], ...]]:
    """A kernel's file, the name of its type, and what makes each of its arguments what it takes.

    Kernels that are started one by one wait for Python: what can be looked up once is.
    """
    file, types = signatures()[name]
    return file, dtype.name, tuple(_parameter(name, kind, dtype) for kind in types)


@cache
def compiled(file: str, name: str, real: str) -> Any:
    """A kernel of a CUDA file, with ``real`` (float32, or uint16 for bfloat16) as the type of activations."""
    return _module(file, real).get_function(name)


@cache
def _module(file: str, real: str) -> Any:
    device = current()
    return device.cupy.RawModule(code=source(file), options=options(file, real, device.capability))


def options(file: str, real: str, capability: int) -> tuple[str, ...]:
    """The compiler's options for one file on a card of that compute capability (80 for 8.0)."""
    found = (*OPTIONS, "-DBF16") if real == "uint16" else OPTIONS
    if file == "implicit" and capability == 90:
        # Hopper's own instructions need the target's name with an a; of two -arch the compiler takes that one.
        found = (*found, "-DHOPPER", "-arch=sm_90a")
    return found


def _parameter(name: str, kind: str, dtype: np.dtype[Any]) -> Callable[[Any], Any]:
    """What turns an argument into a kernel's parameter of this kind, such as ``"const real*"``, or refuses it."""
    if not kind.endswith("*"):
        return _SCALARS[kind]
    element = kind.removeprefix("const ").removesuffix("*")
    wanted = dtype if element == "real" else np.dtype(_POINTERS[element])
    # uint32 words may be those of a larger number, read one by one.
    fitting = {wanted, *(map(np.dtype, ("uint64", "int64", "int32")) if element == "uint32" else ())}

    def fit(arg: Any) -> Any:
        if arg is None:
            return np.uint64(0)
        if arg.dtype not in fitting:
            raise TypeError(f"{name} takes a {wanted} array for '{kind}', not {arg.dtype}")
        if not arg.flags.c_contiguous:
            raise TypeError(f"{name} takes arrays that lie in memory without gaps")
        return arg

    return fit
