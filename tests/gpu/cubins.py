"""Compiling the kernels for real cards without one: NVRTC by ctypes, and what it says about registers and spills.

``python -m tests.gpu.cubins`` prints the table of ``docs/gpu_tables.md``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from net.gpu import kernels

# sm_90a has the instructions of Hopper alone; the backend compiles for it what uses them.
ARCHITECTURES = ("sm_70", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100")
OTHERS = ("sm_75", "sm_120")  # Turing, and consumers' Blackwell: compiled by the test, not in the table
WITHOUT_BFLOAT16 = ("sm_70", "sm_75")
TYPES = ("float", "bfloat16")

_FUNCTION = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    """What one kernel needs on one card."""

    registers: int
    static_shared: int
    stack: int
    spills: int  # bytes stored and loaded

    @property
    def most_threads(self) -> int:
        """Threads an SM can hold with so many registers, of 65,536."""
        return 65536 // (-(-self.registers // 8) * 8) // 32 * 32


def library_path() -> Path | None:
    """NVRTC from the wheel nvidia-cuda-nvrtc-cu12 (or -cu13); None where neither is installed."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for found in sorted(Path(folder).glob("*/lib/libnvrtc.so.1[0-9]")):
            return found
    return None


@cache
def _library() -> Any:
    path = library_path()
    if path is None:
        raise RuntimeError("NVRTC is not installed: python -m pip install nvidia-cuda-nvrtc-cu12")
    return ctypes.CDLL(str(path))


def supported(architecture: str) -> bool:
    """Whether this NVRTC compiles for the card: version 13 no longer does for sm_70."""
    count = ctypes.c_int()
    _library().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    _library().nvrtcGetSupportedArchs(numbers)
    return _capability(architecture) in numbers


def _capability(architecture: str) -> int:
    return int(architecture.removeprefix("sm_").removesuffix("a"))


def compile_cubin(source: str, architecture: str, definitions: Sequence[str] = ()) -> tuple[bytes, dict[str, Usage]]:
    """The machine code, and each kernel's needs; with the options CuPy compiles with."""
    library, program, size = _library(), ctypes.c_void_p(), ctypes.c_size_t()
    options = [*kernels.OPTIONS, f"-arch={architecture}", "-ftz=true", "--ptxas-options=-v", *definitions]
    names = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        status = library.nvrtcCompileProgram(program, len(options), names)
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        if status:
            raise RuntimeError(f"NVRTC refuses the kernels for {architecture}:\n{log.value.decode()}")
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, code)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw, dict(_usages(log.value.decode()))


def _usages(log: str) -> Any:
    for found in _FUNCTION.finditer(log):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        spills = int(found["stores"]) + int(found["loads"])
        static = int(shared[1]) if shared else 0
        yield found["name"], Usage(int(found["registers"]), static, int(found["frame"]), spills)


def compiled(file: str, kind: str, architecture: str) -> tuple[bytes, dict[str, Usage]]:
    """One of the backend's files, with the definitions it is compiled with for that card."""
    real = "uint16" if kind == "bfloat16" else "float32"
    found = kernels.options(file, real, _capability(architecture))
    return compile_cubin(kernels.source(file), architecture, [o for o in found if o.startswith("-D")])


def table() -> str:
    """Registers of every kernel on every card as Markdown; spills and stack where there are any."""
    lines = [
        "| file | kernel | type | " + " | ".join(ARCHITECTURES) + " |",
        "|---|---|---|" + "---|" * len(ARCHITECTURES),
    ]
    usages: dict[tuple[str, str, str], dict[str, Usage]] = {}
    for file in kernels.sources():
        for kind in TYPES:
            for architecture in ARCHITECTURES:
                if not used(file, kind, architecture) or not supported(architecture):
                    continue
                _, found = compiled(file, kind, architecture)
                for name, usage in found.items():
                    usages.setdefault((file, name, kind), {})[architecture] = usage
    for (file, name, kind), found in sorted(usages.items()):
        cells = (_cell(found[a]) if a in found else "-" for a in ARCHITECTURES)
        lines.append(f"| {file} | {name} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def used(file: str, kind: str, architecture: str) -> bool:
    """Whether the backend compiles a file so: for bfloat16 only with arrays of it, and on cards that have it."""
    if file == "implicit":  # for bfloat16 only, and on Hopper only with that card's own instructions
        return kind == "bfloat16" and architecture not in (*WITHOUT_BFLOAT16, "sm_90")
    if architecture == "sm_90a":
        return False
    if kind == "float":
        return True
    types = [t for kernel, parameters in kernels.signatures().values() if kernel == file for t in parameters]
    return architecture not in WITHOUT_BFLOAT16 and any("real" in t for t in types)


def _cell(usage: Usage) -> str:
    text = str(usage.registers)
    if usage.spills:
        text += f", spills {usage.spills}"
    if usage.stack:
        text += f", stack {usage.stack}"
    return text + (f", shared {usage.static_shared}" if usage.static_shared else "")


if __name__ == "__main__":
    print(table())
