"""Matrix products by cuBLAS, called through ctypes.

CuPy has bindings for the same functions but refuses them while a CUDA graph is recorded (cupy issue 6290), and so do
all of its routines that use them. Here the library has a handle of its own on the backend's stream and a workspace of
its own, so a recorded product allocates nothing and replays with the same bits.

Everything is row-major, as in the rest of the project. cuBLAS is column-major, and a row-major matrix is its
transpose there, so out = a b is asked for as out' = b' a' with the operands exchanged.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from net.gpu.device import current

WORKSPACE: Final = 64 * 2**20  # bytes; cuBLAS recommends 32 MiB for Hopper

# From cublas_api.h and library_types.h.
_TYPES: Final = {"float32": 0, "uint16": 14}  # CUDA_R_32F, CUDA_R_16BF
_COMPUTE: Final = {"fp32": 68, "tf32": 77, "bf16": 68}  # CUBLAS_COMPUTE_32F, _32F_FAST_TF32
_DEFAULT_ALGORITHM: Final = -1
# CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: else a long sum may be split, and its parts added in bfloat16.
_FLOAT_SUMS: Final = 16
_STATUS: Final = {
    1: "not initialised",
    3: "allocation failed",
    7: "invalid value",
    8: "architecture mismatch",
    11: "mapping error",
    13: "execution failed",
    14: "internal error",
    15: "not supported",
}


@dataclass(frozen=True)
class Matrix:
    """A row-major matrix in device memory, or ``batch`` of them.

    ``address`` is that of the first element, ``width`` the number of elements from one row to the next, ``step`` the
    number of elements from one matrix of the batch to the next.
    """

    address: int
    rows: int
    columns: int
    width: int
    dtype: str
    step: int = 0

    @property
    def transposed(self) -> Transposed:
        return Transposed(self)


@dataclass(frozen=True)
class Transposed:
    """The transpose of a matrix, as an operand."""

    matrix: Matrix

    @property
    def rows(self) -> int:
        return self.matrix.columns

    @property
    def columns(self) -> int:
        return self.matrix.rows


def of(a: Any) -> Matrix:
    """A C-contiguous device array of two axes as a matrix."""
    rows, columns = a.shape
    return Matrix(int(a.data.ptr), rows, columns, columns, a.dtype.name)


def multiply(out: Matrix, a: Matrix | Transposed, b: Matrix | Transposed, *, add: bool = False, batch: int = 1) -> None:
    """out = a b, or out += a b; sums in float32 whatever the operands' type.

    Raises
    ------
    ValueError
        Sizes do not fit.
    RuntimeError
        cuBLAS refused.
    """
    if out.rows != a.rows or out.columns != b.columns or a.columns != b.rows:
        raise ValueError(f"{a.rows}x{a.columns} times {b.rows}x{b.columns} is not {out.rows}x{out.columns}")
    if out.rows == 0 or out.columns == 0:
        return
    left, right = _operand(b), _operand(a)
    compute = _COMPUTE[current().precision]
    one, start = ctypes.c_float(1.0), ctypes.c_float(1.0 if add else 0.0)
    sizes = (left.operation, right.operation, out.columns, out.rows, a.columns)
    if batch == 1:
        status = load_library().cublasGemmEx(
            *(_handle(), *sizes, ctypes.byref(one)),
            *(left.matrix.address, _TYPES[left.matrix.dtype], left.matrix.width),
            *(right.matrix.address, _TYPES[right.matrix.dtype], right.matrix.width),
            *(ctypes.byref(start), out.address, _TYPES[out.dtype], out.width),
            *(compute, _DEFAULT_ALGORITHM),
        )
    else:
        status = load_library().cublasGemmStridedBatchedEx(
            *(_handle(), *sizes, ctypes.byref(one)),
            *(left.matrix.address, _TYPES[left.matrix.dtype], left.matrix.width, left.matrix.step),
            *(right.matrix.address, _TYPES[right.matrix.dtype], right.matrix.width, right.matrix.step),
            *(ctypes.byref(start), out.address, _TYPES[out.dtype], out.width, out.step),
            *(batch, compute, _DEFAULT_ALGORITHM),
        )
    _check(status, "a matrix product")


@dataclass(frozen=True)
class _Operand:
    matrix: Matrix
    operation: int  # 0 as it is, 1 transposed


def _operand(m: Matrix | Transposed) -> _Operand:
    return _Operand(m.matrix, 1) if isinstance(m, Transposed) else _Operand(m, 0)


@cache
def load_library() -> Any:
    """The library CuPy uses, found the same way (its wheel, then the system's toolkit), with argument types set.

    Raises
    ------
    RuntimeError, ImportError, OSError
        It is not installed.
    """
    from cuda.pathfinder import load_nvidia_dynamic_lib

    library = ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    declare(library)
    return library


def declare(library: Any) -> None:
    """Argument types of the functions used; ctypes would pass 64-bit numbers as 32 bits without."""
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
    scalar = ctypes.POINTER(ctypes.c_float)
    sizes = (pointer, integer, integer, integer, integer, integer, scalar)
    operand = (pointer, integer, integer)
    library.cublasCreate_v2.argtypes = (ctypes.POINTER(pointer),)
    library.cublasSetMathMode.argtypes = (pointer, integer)
    library.cublasSetStream_v2.argtypes = (pointer, pointer)
    library.cublasSetWorkspace_v2.argtypes = (pointer, pointer, ctypes.c_size_t)
    library.cublasGetVersion_v2.argtypes = (pointer, ctypes.POINTER(integer))
    library.cublasGemmEx.argtypes = (*sizes, *operand, *operand, scalar, *operand, integer, integer)
    library.cublasGemmStridedBatchedEx.argtypes = (
        *(*sizes, *operand, long, *operand, long, scalar, *operand, long),
        *(integer, integer, integer),
    )


@cache
def _handle() -> ctypes.c_void_p:
    library, device = load_library(), current()
    handle = ctypes.c_void_p()
    _check(library.cublasCreate_v2(ctypes.byref(handle)), "its start")
    _check(library.cublasSetMathMode(handle, _FLOAT_SUMS), "its arithmetic")
    _check(library.cublasSetStream_v2(handle, device.stream.ptr), "its stream")
    _check(library.cublasSetWorkspace_v2(handle, _workspace().data.ptr, WORKSPACE), "its workspace")
    return handle


@cache
def _workspace() -> Any:
    return current().cupy.empty((WORKSPACE,), "uint8")


def start() -> None:
    """Create the handle and the workspace now rather than inside the first step."""
    _handle()


def _check(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError(f"cuBLAS failed in {what}: {_STATUS.get(status, f'status {status}')}")
