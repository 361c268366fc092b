"""Every backend offers every operation, with the parameters of the list and of the reference."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType, SimpleNamespace

import pytest

from net import backend, reference

# Of each operation the parameters given by position; the others are keyword-only.
POSITIONAL = {
    "asarray": 1,
    "to_host": 1,
    "empty": 2,
    "host_empty": 2,
    "upload": 1,
    "synchronize": 0,
    "augment": 4,
    "conv2d_forward": 3,
    "conv2d_backward": 3,
    "relu_forward": 1,
    "relu_backward": 2,
    "lrn_forward": 1,
    "lrn_backward": 3,
    "map_norm_forward": 1,
    "map_norm_backward": 3,
    "maxpool_forward": 1,
    "maxpool_backward": 2,
    "linear_forward": 3,
    "linear_backward": 3,
    "dropout_forward": 1,
    "dropout_backward": 1,
    "softmax": 1,
    "cross_entropy": 2,
    "sgd_update": 3,
}
FUSED_POSITIONAL = {
    "conv_block_forward": 3,
    "conv_block_relu_last_forward": 3,
    "conv_block_backward": 3,
    "conv_block_relu_last_backward": 3,
    "linear_block_forward": 3,
    "linear_block_backward": 3,
    "fixed": 1,
    "warm_up": 0,
    "adopt": 1,
    "replayable": 1,
    "check_memory": 3,
    "reduction": 3,
}


def _module(device: str) -> ModuleType:
    """The backend's module, which can be looked at without a graphics card."""
    return importlib.import_module(f"net.{device}")


def _check(function, names, positional, of):
    parameters = list(inspect.signature(function).parameters.values())
    assert tuple(p.name for p in parameters) == names, of
    kinds = [p.kind for p in parameters]
    assert kinds[:positional] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * positional, of
    assert kinds[positional:] == [inspect.Parameter.KEYWORD_ONLY] * (len(names) - positional), of


def test_the_lists_name_the_same_operations():
    assert set(POSITIONAL) == set(backend.OPERATIONS)
    assert set(FUSED_POSITIONAL) == set(backend.FUSED_OPERATIONS)


@pytest.mark.parametrize("device", backend.DEVICES)
def test_a_backend_has_every_operation_with_its_parameters(device):
    ops = _module(device)
    for name, parameters in backend.OPERATIONS.items():
        _check(getattr(ops, name), parameters, POSITIONAL[name], f"net.{device}.{name}")
    for name, parameters in backend.FUSED_OPERATIONS.items():
        if hasattr(ops, name):
            _check(getattr(ops, name), parameters, FUSED_POSITIONAL[name], f"net.{device}.{name}")


@pytest.mark.parametrize("device", backend.DEVICES)
def test_defaults_are_the_references(device):
    ops = _module(device)
    for name in backend.OPERATIONS:
        ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (ops, reference))
        # Every call the reference takes must mean the same here; what it refuses is a backend's own affair.
        for parameter, definition in theirs.items():
            if definition.default is not inspect.Parameter.empty:
                assert ours[parameter].default == definition.default, f"net.{device}.{name}({parameter})"


def test_the_reference_offers_exactly_the_operations():
    assert sorted(reference.__all__) == sorted(backend.OPERATIONS)


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_the_backends_without_special_hardware_load(device):
    assert backend.load(device).__name__ == f"net.{device}"


def test_a_backend_that_lacks_an_operation_is_refused(monkeypatch):
    partial = SimpleNamespace(**{name: getattr(reference, name) for name in backend.OPERATIONS if name != "softmax"})
    monkeypatch.setattr(backend.importlib, "import_module", lambda name: partial)
    with pytest.raises(backend.BackendUnavailableError, match="lacks softmax"):
        backend.load("reference")


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        backend.load("tpu")


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_only_the_gpu_has_other_precisions(device, precision):
    with pytest.raises(backend.BackendUnavailableError, match="fp32 only"):
        backend.load(device, precision)
