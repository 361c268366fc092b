"""Gradients summed over GPUs: with other ranks that have the same batch, two ranks are one to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from net.backend import BackendUnavailableError
from net.gpu import arrays, nccl
from tests.gpu import standin
from tests.gpu.conftest import REAL
from tests.gpu.test_network import batch, start, to_host

pytestmark = pytest.mark.skipif(REAL, reason="needs the stand-in's other rank")

SIZE = 2  # a power of two: a half twice is exact


@pytest.fixture(params=("at once", "late", "copies first"))
def _schedule(request: pytest.FixtureRequest, fp32: ModuleType) -> Iterator[None]:
    arrays.synchronize()
    standin.machine.schedule = request.param
    yield
    standin.machine.schedule = "at once"
    arrays.synchronize()


@pytest.mark.usefixtures("_schedule")
def test_two_ranks_with_the_same_batch_are_one(fp32: ModuleType) -> None:
    trained = []
    for ranks in (1, SIZE):
        reduce = fp32.reduction(0, ranks, lambda address: None) if ranks > 1 else None
        step, parameters, momenta = start(fp32, "paper", reduce=reduce)
        for number in range(2):
            inputs = batch(number)
            if ranks > 1:
                inputs |= {"first": np.zeros(1, np.uint64), "share": np.array([1 / ranks], np.float32)}
            step(fp32.upload(inputs))
        trained.append(to_host(fp32, parameters, momenta))
    for name, value in trained[0].items():
        assert value.tobytes() == trained[1][name].tobytes(), name


def test_the_address_is_the_first_ranks(fp32: ModuleType) -> None:
    def broadcast(address: np.ndarray) -> None:
        assert not address.any()
        address[:] = standin.NCCL_ADDRESS

    fp32.reduction(3, 4, broadcast)


@pytest.mark.parametrize("address", [tuple(range(-64, 64)), tuple(range(128, 256))], ids=["x86", "ARM"])
def test_the_address_may_have_signed_or_unsigned_bytes(
    fp32: ModuleType, monkeypatch: pytest.MonkeyPatch, address: tuple[int, ...]
) -> None:
    import cupy.cuda

    monkeypatch.setattr(standin, "NCCL_ADDRESS", address)
    monkeypatch.setattr(cupy.cuda.nccl, "get_unique_id", lambda: address)
    monkeypatch.setattr(nccl, "_communicators", {})
    fp32.reduction(0, 2, lambda address: None)


def test_without_nccl_the_remedy_is_named(fp32: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy.cuda

    monkeypatch.setattr(cupy.cuda, "nccl", SimpleNamespace())
    monkeypatch.setattr(nccl, "_communicators", {})
    with pytest.raises(BackendUnavailableError, match=r"rank 0 cannot use NCCL .*nvidia-nccl-cu12"):
        fp32.reduction(0, 2, lambda address: None)
