"""Whether the GPU can be used, and what is set up once when it is.

Nothing here runs at import: ``cupy`` is imported by :func:`availability` and :func:`start`, so the package can be
imported, and asked why it cannot be used, on any machine.
"""

from __future__ import annotations

import os
from typing import Any, Final

from net.backend import BackendUnavailableError
from net.gpu import cublas
from net.gpu.device import Device, current, started, use

PRECISIONS: Final = ("fp32", "tf32", "bf16")
INSTALL: Final = "python -m pip install '.[gpu]' (or '.[gpu13]' for CUDA 13, which needs driver 580 or newer)"

_OTHER_FOLDER: Final = "let the environment variable CUPY_CACHE_DIR name one that can be written"
_PROBE: Final = 'extern "C" __global__ void __launch_bounds__(32) probe() {}'


def availability() -> str | None:
    """None where a GPU can be used, else one sentence that says why not and what mends it."""
    try:
        import cupy
    except ImportError as error:
        if getattr(error, "name", None) == "cupy":
            return f"CuPy is not installed: {INSTALL}"
        return f"CuPy is installed but cannot be loaded ({_first_line(error)}): {INSTALL}"
    except OSError as error:  # it makes its cache's folder when it is imported
        return f"CuPy cannot make its folder for compiled kernels ({_first_line(error)}): {_OTHER_FOLDER}"
    if not cupy.cuda.is_available():
        return _no_card(cupy)
    try:
        cupy.cuda.nvrtc.getVersion()
        cublas.load_library()
    except (ImportError, RuntimeError, OSError) as error:
        return f"the CUDA libraries NVRTC and cuBLAS cannot be loaded ({_first_line(error)}): {INSTALL}"
    try:
        cupy.cuda.Device().use()
        capability = int(cupy.cuda.Device().compute_capability)
    except RuntimeError as error:
        return f"the GPU cannot be used ({_first_line(error)}): nvidia-smi shows what the driver sees"
    if capability < 70:
        return f"the GPU is too old (compute capability {capability / 10}, 7.0 is needed): use --device cpu"
    try:
        # CuPy needs the toolkit's headers for every kernel and looks for them when it compiles the first.
        cupy.RawModule(code=_PROBE).get_function("probe")
    except (RuntimeError, cupy.cuda.compiler.CompileException) as error:
        older = "; CUDA 13 has no code for cards below compute capability 7.5" if capability < 75 else ""
        return f"CuPy cannot compile kernels ({_first_line(error)}{older}): {INSTALL}"
    except OSError as error:  # a folder that is there but takes no files, or no place for temporary ones
        return f"CuPy cannot keep compiled kernels ({_first_line(error)}): {_OTHER_FOLDER}"
    return None


def _no_card(cupy: Any) -> str:
    """Why CUDA counts no cards, in one sentence."""
    driver, made_for = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    if 0 < driver // 1000 < made_for // 1000:
        return (
            f"the driver knows CUDA up to {driver // 1000}.{driver % 1000 // 10}, but CuPy was made for CUDA "
            f"{made_for // 1000}: install a newer driver, or CuPy for the older CUDA: {INSTALL}"
        )
    if driver == 0:
        return "no NVIDIA GPU with a working driver was found: nvidia-smi shows what the driver sees"
    try:
        cupy.cuda.runtime.getDeviceCount()  # is_available() keeps what this says to itself
        said = ""
    except RuntimeError as error:
        said = f" ({_first_line(error)})"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # a launcher, a scheduler, or pipeline.mpi where a machine has more ranks than cards
        return (
            f"there is a driver, but no GPU among CUDA_VISIBLE_DEVICES={visible!r}{said}: nvidia-smi -L lists them, "
            "and of a machine's each rank takes one"
        )
    return f"there is a driver, but no GPU that can be used{said}: nvidia-smi shows what the driver sees"


def start(precision: str = "fp32") -> None:
    """Set the GPU up for ``precision``, once per process; later calls may only change the precision.

    Raises
    ------
    BackendUnavailableError
        No driver, no CuPy, a missing CUDA library, a precision the GPU does not have, or no memory even to begin.
    """
    if precision not in PRECISIONS:
        raise BackendUnavailableError(f"the GPU computes in {', '.join(PRECISIONS)}, not in {precision!r}")
    reason = availability()
    if reason is not None:
        raise BackendUnavailableError(reason)
    import cupy

    device = cupy.cuda.Device()
    capability = int(device.compute_capability)
    if precision != "fp32" and capability < 80:
        raise BackendUnavailableError(
            f"this GPU (compute capability {capability / 10}) has no {precision} arithmetic, "
            "which needs 8.0: use --precision fp32"
        )
    # With priority over the stream beside it (beside.py), whose kernels would else go first when queued first.
    stream = current().stream if started() else cupy.cuda.Stream(non_blocking=True, priority=-1)
    stream.use()
    properties = cupy.cuda.runtime.getDeviceProperties(device.id)
    name = properties["name"]
    use(
        Device(
            cupy=cupy,
            stream=stream,
            name=name.decode() if isinstance(name, bytes) else name,
            capability=capability,
            memory=int(properties["totalGlobalMem"]),
            processors=int(properties["multiProcessorCount"]),
            shared_processor=int(properties["sharedMemPerMultiprocessor"]),
            precision=precision,
            storage="uint16" if precision == "bf16" else "float32",
        )
    )
    free, total = cupy.cuda.runtime.memGetInfo()
    try:
        cublas.start()
    except (RuntimeError, MemoryError) as error:  # on a card that others have filled cuBLAS is "not initialised"
        raise BackendUnavailableError(
            f"the GPU's libraries cannot start ({_first_line(error)}) with {free / 2**30:.1f} of its "
            f"{total / 2**30:.1f} GiB free: nvidia-smi lists the programs that use it"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
