"""The harness itself: kernels broken on purpose must be caught, each in the way a reader would expect.

The broken kernels are copies of the backend's own with one thing changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest

from net.gpu import kernels
from tests.gpu import standin, test_blocks, test_implicit
from tests.gpu.conftest import need_compiler
from tests.gpu.shim import build
from tests.net import cases


@dataclass(frozen=True)
class Mistake:
    name: str
    file: str
    old: str
    new: str
    caught_by: str  # a case of the operations' tests, or a block of the blocks'

    def __str__(self) -> str:
        return self.name


BLOCK, ODD = "all of it, alpha 1", "odd maps"
BARRIER = "            __syncthreads();\n            if (mine) store<V>(shared + p * channels + i, n);"
MISTAKES = [
    # A missing barrier.
    Mistake("LRN in place, no barrier before overwriting", "relu_lrn_pool", BARRIER, BARRIER.split("\n")[1], BLOCK),
    Mistake(
        "no barrier between a and its neighbours' reading it, backward",
        "relu_lrn_pool",
        "            if (mine) store<V>(shared + own_a + i, a);\n            __syncthreads();",
        "            if (mine) store<V>(shared + own_a + i, a);",
        BLOCK,
    ),
    Mistake(
        "no barrier between t and its neighbours' reading it",
        "relu_lrn_pool",
        "                store<V>(shared + own_t + i, t);\n            }\n            __syncthreads();",
        "                store<V>(shared + own_t + i, t);\n            }",
        BLOCK,
    ),
    Mistake(
        "no barrier after the tile is loaded",
        "relu_lrn_pool",
        "    }\n    __syncthreads();\n    if (lrn) {\n        // In place",
        "    }\n    if (lrn) {\n        // In place",
        ODD,
    ),
    Mistake(
        "no barrier in the column sum",
        "column_sum",
        "    shared[lane * 32 + i] = sum;\n    __syncthreads();",
        "    shared[lane * 32 + i] = sum;",
        "linear_backward: odd",
    ),
    Mistake(
        "no barrier in the softmax's reduction",
        "loss",
        "shared[threadIdx.x / 32] = x;\n    __syncthreads();",
        "shared[threadIdx.x / 32] = x;",
        "softmax: 1000 classes",
    ),
    # Memory nobody has written.
    Mistake(
        "shared memory read without being written",
        "loss",
        "if (threadIdx.x % 32 == 0) shared",
        "if (threadIdx.x == 0) shared",
        "softmax: 1000 classes",
    ),
    Mistake(
        "the filling of a row is not zeroed",
        "columns",
        "                put(pack.at[v], 0.0f);\n        }\n        *reinterpret_cast<Pack<real, WIDE>*>(to",
        "                ;\n        }\n        *reinterpret_cast<Pack<real, WIDE>*>(to",
        "conv2d_forward: odd, 3x3",
    ),
    # Off by one.
    Mistake("a row too far", "columns", "row + kh[v] < height", "row + kh[v] <= height", "conv2d_forward: odd, 3x3"),
    Mistake("gather misses a row", "columns", "r >= out_height", "r >= out_height - 1", "conv2d_backward: odd, 3x3"),
    Mistake("LRN's window too short", "relu_lrn_pool", "+ (x[V + v + 1] + x[V + v + 2])", "+ x[V + v + 1]", BLOCK),
    Mistake(
        "LRN's window too short, any size",
        "relu_lrn_pool",
        "j <= min(channels - 1, i + v + half)",
        "j < min(channels - 1, i + v + half)",
        ODD,
    ),
    Mistake("the last maximum wins", "maxpool", "value > best ||", "value >= best ||", "maxpool_forward: 3/2, ties"),
    Mistake("NaN does not win", "maxpool", "|| (isnan(value) && !isnan(best))", "", "maxpool_forward: 3/2, NaN"),
    Mistake("the last maximum wins, fused", "relu_lrn_pool", "return !(x <= best)", "return !(x < best)", "ties"),
    Mistake("NaN does not win, fused", "relu_lrn_pool", "!(x <= best) && best == best", "x > best", "ties"),
    Mistake("the ReLU that comes last is forgotten on the way back", "relu_lrn_pool", "d[v] = positive(a[v])",
            "d[v] = true", "ReLU last, without LRN"),
    Mistake("a window that a pixel lies in is forgotten", "relu_lrn_pool", "if (q > last_q) break;",
            "if (q >= last_q) break;", BLOCK),
    Mistake("the pool's last window is forgotten", "maxpool", "out_height - 1); r++", "out_height - 2); r++",
            "maxpool_backward: 3/2, odd"),
    Mistake("the last elements are forgotten", "elementwise", "if (e < size) put(y[e], relu",
            "if (e + 1 < size) put(y[e], relu", "relu_forward: odd"),
    # Wrong formula.
    Mistake("ReLU lets no NaN through", "common", "< 0 && !isnan(x)", "< 0 || isnan(x)",
            "relu_forward: special values"),
    Mistake("momentum on the new speed only", "sgd", "weight[j] += speed[j]", "weight[j] += lr * speed[j]",
            "sgd_update: visible decay"),
    Mistake("the step's upper half is dropped", "dropout", "(uint32)(step >> 32)}", "0u}",
            "dropout_forward: step above 32 bits"),
    Mistake("rows before the first are not counted", "dropout", "start / 4 + block", "block",
            "dropout_forward: half, scaled, from row 64"),
    Mistake("nine rounds of Philox", "dropout", "round < 10", "round < 9", "dropout_forward: half"),
    Mistake("the mean does not mirror", "augment", "corner[2 * n + 1] + from", "corner[2 * n + 1] + c",
            "augment: mean larger than the crop"),
]  # fmt: skip


@pytest.fixture
def with_mistake(
    backend: Callable[[str], ModuleType], pretended: standin.Machine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Mistake], ModuleType]]:
    original = {file: kernels.source(file) for file in kernels.sources()}

    def apply(mistake: Mistake) -> ModuleType:
        changed = dict(original)
        for file, text in original.items():
            if mistake.file in (file, "common"):
                assert text.count(mistake.old) >= 1, "the text to break is no longer there"
                changed[file] = text.replace(mistake.old, mistake.new)
        monkeypatch.setattr(kernels, "source", changed.__getitem__)
        _forget_kernels()
        return backend("fp32")

    yield apply
    monkeypatch.undo()
    _forget_kernels()


def _forget_kernels() -> None:
    kernels.compiled.cache_clear()
    kernels._module.cache_clear()


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_is_caught(with_mistake: Callable[[Mistake], ModuleType], mistake: Mistake) -> None:
    ops = with_mistake(mistake)
    caught = []
    for order in build.ORDERS:
        build.settings.order = order
        try:
            _run(ops, mistake.caught_by)
        except (AssertionError, build.KernelError):
            caught.append(order)
    assert caught, "no order of the threads showed the mistake"
    if "barrier" not in mistake.name:
        assert caught == list(build.ORDERS)


def _run(ops: ModuleType, name: str) -> None:
    if name == "ties":
        test_blocks.test_ties_go_to_the_first_place_and_nan_wins(ops)
    elif block := next((b for b in test_blocks.BLOCKS if b.name == name), None):
        test_blocks.check(ops, block, 2e-5)
    else:
        cases.check(ops, next(c for c in cases.ALL if str(c) == name), 1e-5)


# --- what CUDA forbids ---------------------------------------------------------------------------------------------

SUM = """
extern "C" __global__ void __launch_bounds__(256) neighbour(float* x) {
    extern __shared__ float shared[];
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}
"""


@pytest.fixture
def shim() -> Iterator[None]:
    need_compiler()
    before = build.settings.order
    yield
    build.settings.order = before


def _device(values: np.ndarray) -> standin.ndarray:
    array = standin.empty(values.shape, values.dtype)
    array.set(values)
    return array


def _kernel(source: str, name: str = "neighbour") -> build.Kernel:
    return build.Module(source).get_function(name)


@pytest.mark.parametrize("order", build.ORDERS)
def test_a_correct_kernel_runs(shim: None, order: str) -> None:
    build.settings.order = order
    x = _device(np.arange(96, dtype=np.float32))
    _kernel(SUM)((1,), (96,), (x,), shared_mem=96 * 4)
    np.testing.assert_array_equal(x.get(), np.roll(np.arange(96), -1))


def test_a_missing_barrier_shows_in_reversed_order_only(shim: None) -> None:
    """Why the orders are there: run forwards, every thread but the first finds its left neighbour's value."""
    text = SUM.replace("    __syncthreads();\n", "").replace("(threadIdx.x + 1)", "(threadIdx.x + blockDim.x - 1)")
    wrong = {}
    for order in ("forward", "reversed"):
        build.settings.order = order
        x = _device(np.arange(96, dtype=np.float32))
        _kernel(text)((1,), (96,), (x,), shared_mem=96 * 4)
        wrong[order] = np.count_nonzero(x.get()[1:] != np.arange(95))
    assert wrong == {"forward": 0, "reversed": 95}


def test_threads_at_different_barriers(shim: None) -> None:
    different = "if (threadIdx.x < 7) {\n__syncthreads();\n} else {\n__syncthreads();\n}"
    text = SUM.replace("    __syncthreads();", different)
    with pytest.raises(build.KernelError, match="different barriers"):
        _kernel(text)((1,), (96,), (_device(np.zeros(96, np.float32)),), shared_mem=96 * 4)


def test_a_shuffle_with_absent_lanes(shim: None) -> None:
    text = SUM.replace(
        "    __syncthreads();", "    if (threadIdx.x < 20) x[0] = __shfl_xor_sync(0xffffffffu, x[1], 1);"
    )
    with pytest.raises(build.KernelError, match="shuffle waits"):
        _kernel(text)((1,), (32,), (_device(np.zeros(32, np.float32)),), shared_mem=32 * 4)


@pytest.mark.parametrize("width", [32, 96])
def test_shuffles_move_values_between_lanes(shim: None, width: int) -> None:
    text = SUM.replace(
        "    __syncthreads();",
        "    __syncthreads();\n    x[threadIdx.x] = __shfl_down_sync(~0u, x[threadIdx.x], 3);\n    return;",
    )
    for order in build.ORDERS:
        build.settings.order = order
        x = _device(np.arange(width, dtype=np.float32))
        _kernel(text)((1,), (width,), (x,), shared_mem=width * 4)
        lanes = np.arange(width)
        np.testing.assert_array_equal(x.get(), np.where(lanes % 32 < 29, lanes + 3, lanes))


@pytest.mark.parametrize(
    ("grid", "block", "args", "words"),
    [
        ((1,), (96,), (), "1 arguments, not 0"),
        ((1,), (96,), (1.0,), "Python number"),
        ((1,), (96,), (np.float32(1),), "4 bytes, not 8"),
        ((1,), (96,), (np.zeros(96, np.float32),), "host array"),
        ((0,), (96,), (np.uint64(0),), "illegal grid"),
        ((1, 65536), (96,), (np.uint64(0),), "illegal grid"),
        ((1,), (257,), (np.uint64(0),), "illegal block"),  # above __launch_bounds__
        ((1,), (0,), (np.uint64(0),), "illegal block"),
    ],
)
def test_illegal_launches(shim: None, grid: tuple, block: tuple, args: tuple, words: str) -> None:
    with pytest.raises(build.KernelError, match=words):
        _kernel(SUM)(grid, block, args, shared_mem=96 * 4)


def test_more_shared_memory_than_was_asked_for(shim: None) -> None:
    with pytest.raises(build.KernelError, match="not asked for"):
        _kernel(SUM)((1,), (96,), (np.uint64(0),), shared_mem=50 * 1024)


def test_static_shared_memory_is_refused(shim: None) -> None:
    with pytest.raises(build.KernelError, match="static shared memory"):
        _kernel(SUM.replace("extern __shared__ float shared[];", "__shared__ float shared[96];"))


def test_the_backend_checks_arguments_before_they_reach_the_gpu(fp32: ModuleType) -> None:
    x = fp32.asarray(np.ones(4, np.float32))
    with pytest.raises(TypeError, match="takes 3 arguments, not 2"):
        kernels.launch("relu_forward", (1,), (x, x), dtype="float32")
    with pytest.raises(TypeError, match="float32 array"):
        kernels.launch("relu_forward", (1,), (x, fp32.asarray(np.ones(4, np.int32)), 4), dtype="float32")
    strided = fp32.asarray(np.ones((4, 4), np.float32))[:, ::2]
    with pytest.raises(TypeError, match="without gaps"):
        kernels.launch("relu_forward", (1,), (strided, strided, 8), dtype="float32")


def test_every_kernel_is_run_by_these_tests(
    backend: Callable[[str], ModuleType], fp32: ModuleType, pretended: standin.Machine
) -> None:
    """Run last in this file or alone: each kernel of the sources has a case or block that launches it."""
    for case in cases.ALL:
        if not case.layer:
            cases.run(fp32, case)
    for block in test_blocks.BLOCKS:
        test_blocks.check(fp32, block, 2e-5)
    arrays = [fp32.asarray(np.ones(s, np.float32)) for s in ((3, 8), (8, 4), (4,))]
    fp32.linear_block_forward(*arrays, training=False)
    from net.gpu.arrays import cast

    cast(cast(arrays[0], "uint16"), "float32")
    in_bf16 = backend("bf16")
    for case in (*test_implicit.CASES[:3], test_implicit.CASES[-1]):
        test_implicit.check(in_bf16, case)
    assert set(kernels.signatures()) <= set(build.settings.launches)
