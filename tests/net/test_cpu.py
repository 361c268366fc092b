"""The CPU backend's operations against the reference, and its promises about memory and threads."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np
import pytest

import net.cpu
from net import backend, network, reference
from net.alexnet import alexnet
from net.cpu import memory, update, winograd
from net.layers import Layer, fuse
from tests.command_line import ROOT
from tests.net import cases


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_agrees_with_the_reference(case: cases.Case) -> None:
    cases.check(net.cpu, case, tolerance=1e-5)


def test_vectors_of_eight_numbers_serve_where_there_are_none_of_sixteen(tmp_path: Path) -> None:
    """The layouts follow the processor's vectors; most have no AVX-512, and no machine has several widths."""
    # "generic" is the least that any processor of this kind has; optimising less saves most of the compiling.
    narrow = {"NUMBA_CPU_NAME": "generic", "NUMBA_OPT": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    script = (
        "import net.cpu\nfrom net.cpu.simd import LANES\nfrom tests.net import cases\nassert LANES == 8\n"
        "for case in cases.ALL:\n    if case.operation.startswith('conv2d') and case.name in ('odd, 3x3', 'conv2'):\n"
        "        cases.check(net.cpu, case, tolerance=1e-5)\n        print(case)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **narrow}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.parametrize("label", [-1, 3])
@pytest.mark.parametrize("ops", [net.cpu, reference], ids=["cpu", "reference"])
def test_a_label_that_no_class_has_is_refused(ops: ModuleType, label: int) -> None:
    with pytest.raises(ValueError, match="between 0 and 2"):
        ops.cross_entropy(np.zeros((2, 3), np.float32), np.array([0, label], np.int32))


@pytest.mark.parametrize(
    ("weights", "groups"), [((3, 3, 8, 8), 1), ((3, 3, 2, 8), 2), ((3, 3, 1, 8), 3)], ids=["deeper", "one over", "maps"]
)
def test_weights_of_another_picture_are_refused(weights: tuple[int, ...], groups: int) -> None:
    """The kernels take the sizes from the weights, and would read what lies behind the picture."""
    x, w, b = np.zeros((2, 9, 9, 3), np.float32), np.zeros(weights, np.float32), np.zeros(8, np.float32)
    with pytest.raises(ValueError, match="do not fit a picture of 3 channels"):
        net.cpu.conv2d_forward(x, w, b, stride=1, pad=1, groups=groups)
    with pytest.raises(ValueError, match=r"weights \(9, 4\) do not fit"):
        net.cpu.linear_forward(np.zeros((2, 8), np.float32), np.zeros((9, 4), np.float32), np.zeros(4, np.float32))


def test_an_infinite_score_makes_the_loss_of_its_picture_nan_and_says_nothing() -> None:
    scores = np.zeros((2, 3), np.float32)
    scores[1, 2] = np.inf
    loss, _ = net.cpu.cross_entropy(scores, np.array([0, 0], np.int32))
    assert np.isnan(loss).tolist() == [False, True]


def test_scores_further_apart_than_float32_reaches_make_the_loss_infinite_and_say_nothing() -> None:
    loss, dz = net.cpu.cross_entropy(np.array([[3e38, -3e38]] * 2, np.float32), np.array([0, 1], np.int32))
    assert loss.tolist() == [0, np.inf]
    np.testing.assert_array_equal(dz, [[0, 0], [0.5, -0.5]])


# --- memory --------------------------------------------------------------------------------------------------------


def test_arrays_are_aligned_and_contiguous() -> None:
    for shape, dtype in (((3, 5, 7), np.float32), ((1,), np.uint8), ((0, 4), np.float32), ((700, 700), np.float64)):
        a = memory.empty(shape, dtype)
        assert (a.shape, a.dtype) == (shape, dtype)
        assert a.flags.carray
        assert a.ctypes.data % 64 == 0


def test_memory_returns_when_the_last_view_is_gone_and_not_before() -> None:
    a = memory.empty((1000, 3000))
    address = a.ctypes.data
    view = a.reshape(-1)[5:10]
    a[:] = 1
    del a
    gc.collect()
    other = memory.empty((1000, 3000))
    assert other.ctypes.data != address, "handed out while a view was alive"
    other[:] = 2
    assert (view == 1).all()
    grown = memory.pool_bytes()
    del view
    assert memory.empty((1000, 3000)).ctypes.data == address, "not handed out again"
    assert memory.pool_bytes() == grown


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_one_array_can_lie_where_several_others_did(order: tuple[int, ...]) -> None:
    region = memory._Region(4 << 20)
    assert [region.take(1 << 20) for _ in range(4)] == [number << 20 for number in range(4)]
    for number in order:
        assert region.take(4 << 20) is None, "handed out while a part was in use"
        region.give_back(number << 20, (number + 1) << 20)
    assert region.take(4 << 20) == 0


def test_the_lowest_piece_is_taken_first() -> None:
    region = memory._Region(4 << 20)
    for _ in range(4):
        region.take(1 << 20)
    region.give_back(3 << 20, 4 << 20)
    region.give_back(1 << 20, 2 << 20)
    assert region.take(64) == 1 << 20
    assert region.take(1 << 20) == 3 << 20
    assert region.used == 4 << 20


def test_arrays_never_overlap() -> None:
    random = np.random.default_rng(7)
    alive: dict[int, np.ndarray] = {}
    for number in range(3000):
        a = memory.empty(int(random.integers(1, 1 << int(random.integers(1, 21)))), np.uint8)
        a[[0, -1]] = number % 251
        alive[number] = a
        if len(alive) > 40:
            for old in random.choice(list(alive), int(random.integers(1, 40)), replace=False):
                ends = alive.pop(int(old))[[0, -1]]
                assert (ends == old % 251).all(), "another array was written over it"


def test_more_than_a_region_gets_one_of_its_own() -> None:
    large = memory.empty((memory._REGION >> 2) + 1)  # address space only: it is not written to
    assert large.ctypes.data % 64 == 0
    assert large.size == (memory._REGION >> 2) + 1


def test_what_the_host_laid_out_well_is_not_copied() -> None:
    zeros = network.zeros({"w": (3, 5, 7), "b": (11,), "one": (1, 1)})
    for name, a in zeros.items():
        assert a.dtype == np.float32, name
        assert not a.any(), name
        assert net.cpu.adopt(a) is a, name
    w = zeros["w"]
    read_only = network.zeros({"w": (4, 4)})["w"]
    read_only.flags.writeable = False
    for a in (w[:, :, 1:], w.transpose(2, 1, 0), w.reshape(-1)[1:], read_only):
        copy = net.cpu.adopt(a)
        assert not np.shares_memory(copy, a)
        assert copy.flags.carray
        assert copy.ctypes.data % 64 == 0
        np.testing.assert_array_equal(copy, a)


def test_warming_up_runs_a_kernel_and_is_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    before, kernel, runs = update.count(), update._update, []
    monkeypatch.setattr(update, "_update", lambda *given: runs.append(kernel(*given)))
    net.cpu.warm_up()
    assert runs
    assert update.count() == before, "what was derived from fixed weights would be computed again"


@pytest.mark.parametrize(
    ("images", "depth", "maps"), [(1, 3, 5), (7, 101, 16), (5, 49, 23), (128, 97, 1000), (3, 6, 1)]
)
def test_an_update_by_a_gradient_not_yet_computed(images: int, depth: int, maps: int) -> None:
    random = np.random.default_rng(images)
    x, w, v = (random.standard_normal(shape, dtype=np.float32) for shape in ((images, depth), *[(depth, maps)] * 2))
    dy = random.standard_normal((images, maps), dtype=np.float32)
    memory.poison(np.float32(np.nan))
    _, gradient, _ = net.cpu.linear_backward(dy, x, w, need_dx=False)
    assert not isinstance(gradient, np.ndarray)
    numbers = {"lr": 0.1, "momentum": 0.9, "decay": 0.05}
    theirs = w.copy(), v.copy()
    reference.sgd_update(*theirs, x.T @ dy, **numbers)
    for dw in (gradient, np.asarray(gradient)):
        ours = net.cpu.asarray(w), net.cpu.asarray(v)
        net.cpu.sgd_update(*ours, dw, **numbers)
        for mine, expected in zip(ours, theirs, strict=True):
            cases.assert_close(mine, expected, 1e-5)


def test_host_arrays_are_copied() -> None:
    host = np.arange(6, dtype=np.float32)
    device = net.cpu.upload({"a": host})["a"]
    host[:] = -1
    np.testing.assert_array_equal(device, np.arange(6))
    back = net.cpu.to_host(device)
    device[:] = -2
    np.testing.assert_array_equal(back, np.arange(6))


# --- a whole training step -----------------------------------------------------------------------------------------


SEED: Final = alexnet(10, lrn_size=4, final_relu=True)
ORIGINAL: Final = alexnet(10, relu_before_lrn=False, map_norm=True)


class Training:
    """AlexNet on small pictures: 67 x 67 leaves one pixel after the last pool."""

    def __init__(
        self, ops: ModuleType, batch: int = 6, layers: Sequence[Layer] = SEED, frozen: frozenset[str] = frozenset()
    ) -> None:
        self.ops, self.batch, self.count = ops, batch, 0
        layers = fuse(layers, ops)
        shapes = network.parameter_shapes(layers, (67, 67, 3))
        initial = network.initial_parameters(shapes, (0.0,) * 8, (0.1,) * 8, seed=1)
        self.parameters = {name: ops.asarray(a) for name, a in initial.items()}
        self.momenta = {name: ops.asarray(np.zeros_like(a)) for name, a in initial.items()}
        preparation = network.Preparation(mean=None, scale=1 / 255, bgr=False, border=(2, 1))
        descent = network.Descent(momentum=0.9, decay=dict.fromkeys(initial, 5e-4), frozen=frozen)
        self.run = network.training_step(ops, layers, self.parameters, self.momenta, preparation, descent, seed=3)
        self.new_prediction = partial(network.prediction, ops, layers, self.parameters, preparation, views=1)
        self.predict = self.new_prediction()
        self.random = np.random.default_rng(4)

    def batch_of(self, n: int) -> dict[str, np.ndarray]:
        random = self.random
        return {
            "images": random.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8),
            "corner": np.zeros((n, 2), np.int32),
            "flip": random.integers(0, 2, n, dtype=np.uint8),
            "shift": random.standard_normal((n, 3), dtype=np.float32),
            "labels": random.integers(0, 10, n, dtype=np.int32),
            "rates": np.full(len(self.parameters), 0.01, np.float32),
            "step": np.array([self.count], np.uint64),
        }

    def step(self) -> np.ndarray:
        batch = self.batch_of(self.batch)
        self.count += 1
        return self.ops.to_host(self.run(self.ops.upload(batch)))


def test_the_pool_does_not_grow_after_the_first_step() -> None:
    training = Training(net.cpu)
    training.step()
    gc.collect()  # where a kernel had to be compiled, Numba leaves cycles behind that hold its arguments
    after_first = memory.pool_bytes()
    for _ in range(3):
        training.step()
    assert memory.pool_bytes() == after_first


@pytest.mark.parametrize("layers", [SEED, ORIGINAL], ids=["seed", "original"])
def test_training_agrees_with_the_reference(layers: Sequence[Layer]) -> None:
    """In both orders of ReLU, LRN and pool, so that whatever ``fuse`` finds to put together is compared."""
    ours, theirs = (Training(ops, batch=3, layers=layers) for ops in (net.cpu, backend.load("reference")))
    for _ in range(3):
        cases.assert_close(ours.step(), theirs.step(), 1e-4)
    for name, w in theirs.parameters.items():
        cases.assert_close(ours.parameters[name], w, 1e-4, name)
        # Three small steps hardly move the weights; a wrong gradient is most of what a momentum holds.
        cases.assert_close(ours.momenta[name], theirs.momenta[name], 1e-4, f"{name}, momentum")


@pytest.mark.parametrize("ops", [net.cpu, backend.load("reference")], ids=["cpu", "reference"])
@pytest.mark.parametrize("layers", [SEED, ORIGINAL], ids=["seed", "original"])
@pytest.mark.parametrize(
    "frozen", [("conv1", "conv2"), ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6"), ("conv1", "conv3", "fc8")]
)
def test_frozen_layers_stay_and_the_others_move_as_without_freezing(
    ops: ModuleType, layers: Sequence[Layer], frozen: tuple[str, ...]
) -> None:
    """One step: from the second on, the others' gradients are those of another network."""
    names = frozenset(f"{layer}.{kind}" for layer in frozen for kind in "wb")
    some, all_ = Training(ops, 2, layers, names), Training(ops, 2, layers)
    before = {name: ops.to_host(a).copy() for name, a in some.parameters.items()}
    np.testing.assert_array_equal(some.step(), all_.step())
    for name, w in some.parameters.items():
        expected = before[name] if name in names else all_.parameters[name]
        np.testing.assert_array_equal(w, expected, name)
        assert np.any(all_.parameters[name] != before[name]), name
        assert np.any(some.momenta[name]) == (name not in names), name


@pytest.mark.parametrize("images", [1, 5])
def test_a_prediction_is_never_that_of_older_weights(images: int) -> None:
    training = Training(net.cpu)
    batch = training.batch_of(images)
    before = training.predict(batch).copy()
    np.testing.assert_array_equal(training.predict(batch), before)
    training.step()
    after = training.predict(batch)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_array_equal(after, training.new_prediction()(batch))


def test_filters_are_transformed_once_between_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    training, shapes = Training(net.cpu), []
    transformed = winograd.filters
    monkeypatch.setattr(winograd, "filters", lambda w, s: shapes.append(w.shape) or transformed(w, s))
    batch = training.batch_of(1)
    for _ in range(3):
        training.predict(batch)
    assert len(shapes) == 5, "one for each convolution"
    training.step()
    shapes.clear()
    for _ in range(3):
        training.predict(batch)
    assert len(shapes) == 5


def test_a_part_of_fixed_weights_has_filters_of_its_own() -> None:
    random = np.random.default_rng(8)
    x = random.standard_normal((1, 9, 9, 32), dtype=np.float32)
    w = net.cpu.fixed({"w": random.standard_normal((3, 3, 32, 64), dtype=np.float32)})["w"]
    b = np.zeros(64, np.float32)
    whole = net.cpu.conv2d_forward(x, w, b, stride=1, pad=1, groups=1)
    half = net.cpu.conv2d_forward(x, w[..., 32:], b[32:], stride=1, pad=1, groups=1)
    np.testing.assert_array_equal(whole[..., 32:], half)


_WEIGHTS_AFTER_STEPS = """
import hashlib, sys
import numpy as np
import numba
import net.cpu
from tests.net.test_cpu import Training
numba.set_num_threads(int(sys.argv[1]))
training = Training(net.cpu, batch=9)
for _ in range(2):
    training.step()
digest = hashlib.sha256()
parameters = training.parameters
picture = training.random.standard_normal((1, 256), np.float32)
scores = net.cpu.linear_forward(picture, parameters["fc6.w"], parameters["fc6.b"])
probabilities = training.predict(training.batch_of(1))
for a in (*parameters.values(), *training.momenta.values(), scores, probabilities):
    digest.update(a.tobytes())
print(digest.hexdigest())
"""


def test_weights_do_not_depend_on_the_number_of_threads() -> None:
    digests = {}
    for threads in (1, 2, 3):
        # Numba needs as many threads at its start as a test may use; BLAS takes its number from the environment.
        environment = {**os.environ, "NUMBA_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", _WEIGHTS_AFTER_STEPS, str(threads)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        digests[threads] = done.stdout.strip()
    assert len(set(digests.values())) == 1, digests


def test_arrays_may_be_freed_by_another_thread() -> None:
    arrays = [memory.empty((1 << 19,)) for _ in range(4)]
    before = memory.pool_bytes()
    thread = threading.Thread(target=arrays.clear)
    thread.start()
    thread.join()
    kept = [memory.empty((1 << 19,)) for _ in range(4)]
    assert memory.pool_bytes() == before
    del kept


@pytest.mark.parametrize("images", [1, 6])
def test_long_sums_are_made_of_parts(images: int) -> None:
    """One chain over fc6's 9216 terms rounds to about 1.2e-6 (root mean square), parts to 2.3e-7."""
    random = np.random.default_rng(images)
    x = np.maximum(random.standard_normal((images, 9216), dtype=np.float32), 0)
    w = random.standard_normal((9216, 96), dtype=np.float32)
    oracle = x.astype(np.float64) @ w.astype(np.float64)
    y = net.cpu.linear_forward(x, w, np.zeros(96, np.float32))
    assert np.sqrt(np.mean((y - oracle) ** 2) / np.mean(oracle**2)) < 5e-7


def test_the_sums_of_winograds_products_are_made_of_pieces() -> None:
    """conv3's channels in one chain round to 1.1e-6 (root mean square), in pieces of 16 to 4.7e-7."""
    random = np.random.default_rng(5)
    x = np.maximum(random.standard_normal((1, 13, 13, 256), dtype=np.float32), 0)
    w = random.standard_normal((3, 3, 256, 384), dtype=np.float32)
    b, geometry = np.zeros(384, np.float32), {"stride": 1, "pad": 1, "groups": 1}
    oracle = backend.load("reference").conv2d_forward(*(a.astype(np.float64) for a in (x, w, b)), **geometry)
    y = net.cpu.conv2d_forward(x, w, b, **geometry)
    assert np.sqrt(np.mean((y - oracle) ** 2) / np.mean(oracle**2)) < 7e-7
