"""From CUDA source text to functions that run on the CPU (see ``shim.h``)."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

HEADER = Path(__file__).with_name("shim.h")
COMPILER = shutil.which("g++")
ORDERS = ("forward", "reversed", "random")
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\((\w+)[\d, ]*\) (\w+)\(')
_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")

# Under a sanitizer everything is built with it; set by the tests that start a Python of their own for it.
SANITIZER = os.environ.get("SHIM_SANITIZER", "")

# The sanitizer's library is for what is built: the compiler itself would take three times as long with it.
_PLAIN = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


class KernelError(RuntimeError):
    """A kernel did what CUDA does not allow."""


@dataclass
class Settings:
    """How launches run: the order of threads and blocks, and a seed that changes with every launch."""

    order: str = "forward"
    seed: int = 0
    launches: dict[str, int] = field(default_factory=dict)


settings = Settings()


def translate(source: str) -> str:
    """The C++ text of a CUDA source; only the declaration of dynamic shared memory is changed."""
    text = _SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(shim::shared_memory);", source)
    if "__shared__" in text:
        raise KernelError("static shared memory is not imitated; use the dynamic kind, extern __shared__ T x[]")
    launchers = "".join(
        f'extern "C" const char* launch_{name}(const unsigned* g, unsigned b, size_t s, void** a, int o, unsigned r) '
        f"{{ return shim::launch({name}, g, b, s, a, o, r); }}\n"
        f'extern "C" int sizes_{name}(int* sizes) {{ return shim::parameter_sizes({name}, sizes); }}\n'
        f'extern "C" unsigned bound_{name}() {{ return {bound}; }}\n'
        for bound, name in _KERNEL.findall(source)
    )
    return f'#include "{HEADER}"\n#line 1 "kernel.cu"\n{text}\n{launchers}'


def compile_library(source: str, definitions: Sequence[str] = ()) -> Path:
    """Build a shared library, or find it in the cache."""
    if COMPILER is None:
        raise KernelError("g++ is not installed")
    flags = [
        "-std=c++17",
        "-O1" if SANITIZER else "-O2",  # half as long to build, a little longer to run
        "-g1",
        "-fPIC",
        "-shared",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-fno-math-errno",
    ]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-function"]
    flags += ["-Wno-unused-variable", "-Wno-maybe-uninitialized", "-Wno-array-bounds", "-Wno-sign-compare"]
    flags += definitions
    synchronises = "__syncthreads" in source or "__shfl" in source
    if not synchronises:
        flags += ["-DSHIM_DIRECT"]
    elif SANITIZER == "thread":
        flags += ["-DSHIM_THREADS"]
    if SANITIZER:
        flags += [f"-fsanitize={SANITIZER}", "-DSHIM_SANITIZED"]
    text = translate(source)
    key = hashlib.sha256("\0".join([text, HEADER.read_text(), *flags, _compiler_version()]).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"alexnet-by-hand-shim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    with open(folder / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests side by side want the same library; one of them builds it
        if library.exists():
            return library
        with tempfile.TemporaryDirectory(dir=folder) as work:
            file, built = Path(work) / "kernel.cpp", Path(work) / "kernel.so"
            file.write_text(text)
            done = subprocess.run(
                [COMPILER, *flags, "-o", built, file], env=_PLAIN, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise KernelError(f"g++ refuses the kernels:\n{done.stderr}")
            built.rename(library)
    return library


@cache
def _compiler_version() -> str:
    command = [COMPILER, "--version"]
    return subprocess.run(command, env=_PLAIN, capture_output=True, text=True, check=True).stdout.splitlines()[0]


class Module:
    """A compiled source; called as CuPy's RawModule is."""

    def __init__(self, source: str, definitions: Sequence[str] = ()) -> None:
        self._library = ctypes.CDLL(str(compile_library(source, definitions)))

    def get_function(self, name: str) -> Kernel:
        return Kernel(self._library, name)


class Kernel:
    """One kernel. Arguments are NumPy scalars and objects with a device pointer, as CuPy takes them."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name = name
        self.max_dynamic_shared_size_bytes = 48 * 1024
        self._launch = getattr(library, f"launch_{name}")
        self._launch.restype = ctypes.c_char_p
        self._most_threads = getattr(library, f"bound_{name}")()
        sizes = (ctypes.c_int * 64)()
        count = getattr(library, f"sizes_{name}")(sizes)
        self.sizes = list(sizes[:count])

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        queue: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        """Run now, or hand the run to ``queue``; arguments are read now either way, as a CUDA launch does."""
        if len(args) != len(self.sizes):
            raise KernelError(f"{self.name} takes {len(self.sizes)} arguments, not {len(args)}")
        values = [_bytes(arg) for arg in args]
        for position, (value, size) in enumerate(zip(values, self.sizes, strict=True)):
            if len(value) != size:
                raise KernelError(f"{self.name}: argument {position} has {len(value)} bytes, not {size}")
        full = [*grid, 1, 1][:3]
        threads = block[0]
        if not (0 < full[0] < 2**31 and 0 < full[1] < 65536 and 0 < full[2] < 65536):
            raise KernelError(f"{self.name}: illegal grid {grid}")
        if len(block) > 1 or not 0 < threads <= self._most_threads <= 1024:
            raise KernelError(f"{self.name}: illegal block {block}")
        if shared_mem > self.max_dynamic_shared_size_bytes or shared_mem > 227 * 1024:
            raise KernelError(f"{self.name}: {shared_mem} bytes of shared memory were not asked for")
        buffers = [ctypes.create_string_buffer(value, len(value)) for value in values]
        pointers = (ctypes.c_void_p * max(1, len(buffers)))(*(ctypes.addressof(b) for b in buffers))
        settings.seed += 1
        order, seed = ORDERS.index(settings.order), settings.seed
        settings.launches[self.name] = settings.launches.get(self.name, 0) + 1

        def run(_keep: Any = buffers) -> None:
            size = ctypes.c_size_t(shared_mem)
            message = self._launch((ctypes.c_uint * 3)(*full), ctypes.c_uint(threads), size, pointers, order, seed)
            if message:
                raise KernelError(f"{self.name}: {message.decode()}")

        run() if queue is None else queue(run)


def _bytes(arg: Any) -> bytes:
    if isinstance(arg, np.generic):
        return arg.tobytes()
    if isinstance(arg, np.ndarray):
        raise KernelError("a host array was handed to a kernel")
    if hasattr(arg, "data"):
        return np.uint64(arg.data.ptr).tobytes()
    if isinstance(arg, bool | int | float):
        raise KernelError(f"the Python number {arg!r} was handed to a kernel: CuPy would pass 64 bits")
    raise KernelError(f"cannot hand {type(arg).__name__} to a kernel")
