"""What training takes from a run's files, where they match their checksums but say what cannot be."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.dataset import open_dataset
from net import reference
from pipeline.config import LAYERS, RECIPES, SEED, load_config
from pipeline.config_values import changes
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir, hash_file, read_sealed, write_sealed
from stages import setup
from stages.setup import loader_slots, loader_threads


@pytest.fixture
def run(run: Path) -> RunDir:
    return RunDir(run)


def replace(run: RunDir, name: str, content: bytes) -> None:
    """Put a file in place of one of the run's, with a manifest that vouches for it."""
    (run.preprocess / name).write_bytes(content)
    manifest = read_sealed(run.preprocess / "manifest.json", "")
    manifest["files"][name] = hash_file(run.preprocess / name)
    write_sealed(run.preprocess / "manifest.json", manifest)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


CLAIMS_A_PETABYTE = b"\x93NUMPY\x01\x00v\x00" + (
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 250000, 1), }".ljust(117) + b"\n"
)
COLOR = {"eigenvalues": [3, 2, 1], "eigenvectors": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.json", b"{}"),
        ("classes.json", b'{"classes": 5}'),
        ("classes.json", b'{"classes": []}'),
        ("classes.json", b'{"classes": [1, 2, 3, 4, 5]}'),
        ("classes.json", b'{"classes": [{}, {}, {}, {}, {}]}'),
        ("color.json", b"{}"),
        ("color.json", json.dumps({**COLOR, "eigenvalues": "abc"}).encode()),
        ("color.json", json.dumps({**COLOR, "eigenvalues": [3, 2]}).encode()),
        ("color.json", json.dumps({**COLOR, "eigenvalues": [3, 2, float("nan")]}).encode()),
        ("color.json", json.dumps({**COLOR, "eigenvectors": [[1, 0, 0], [0, 1]]}).encode()),
        ("color.json", json.dumps({**COLOR, "eigenvectors": [[1, 0, 0]]}).encode()),
        ("mean.npy", b""),
        ("mean.npy", b"no array"),
        ("mean.npy", npy(np.zeros((72, 72, 3)))),
        ("mean.npy", npy(np.zeros((72, 72), np.float32))),
        ("mean.npy", npy(np.zeros((256, 256, 3), np.float32))),
        ("mean.npy", npy(np.array([{"a": 1}], dtype=object))),
        ("mean.npy", CLAIMS_A_PETABYTE),
    ],
)
def test_files_that_make_no_sense_are_refused_by_name(run: RunDir, name: str, content: bytes) -> None:
    replace(run, name, content)
    with pytest.raises(PipelineError, match=name) as caught:
        open_dataset(run)
    assert "--stage preprocess" in str(caught.value)


def test_sound_files_of_our_own_are_taken(run: RunDir) -> None:
    color = {"eigenvalues": [4, 1, -1e-20], "eigenvectors": [[0, 1, 0], [1, 0, 0], [0, 0, 1]]}  # as rounding leaves it
    replace(run, "color.json", json.dumps(color).encode())
    replace(run, "mean.npy", npy(np.ones((72, 72, 3), np.float32)))
    dataset = open_dataset(run)
    assert dataset.directions.tolist() == [[0, 510, 0], [255, 0, 0], [0, 0, 0]]
    assert dataset.mean.sum() == 72 * 72 * 3


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sealed_manifest_is_taken_or_refused_plainly(run: RunDir, prepared: Path, data: st.DataObject) -> None:
    """Any value in any place of the manifest, under a checksum that is right."""
    manifest = read_sealed(prepared / "preprocess" / "manifest.json", "")
    place: object = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not (isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans())):
            break
        place = place[key]
    place[key] = data.draw(_json)
    try:
        write_sealed(run.preprocess / "manifest.json", manifest)
    except (ValueError, UnicodeEncodeError):
        return  # NaN is not written
    with contextlib.suppress(PipelineError):
        open_dataset(run)


def test_the_loader_has_threads_that_suit_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    on_host, on_device = SimpleNamespace(), SimpleNamespace(replayable=None)
    monkeypatch.setattr(setup.os, "sched_getaffinity", lambda process: range(12))
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    assert loader_threads(SEED, on_host, 128) == 1  # its cores compute
    assert loader_threads(SEED, on_device, 128) == 9
    assert loader_threads(SEED, on_device, 2560) == 9
    assert loader_threads(SEED, on_device, 10240) == 2  # 1.5 GB a batch
    assert loader_threads(SEED, on_device, 65536) == 1
    monkeypatch.setenv("NUMBA_NUM_THREADS", "4")  # three ranks on this machine
    assert loader_threads(SEED, on_device, 128) == 3
    monkeypatch.setenv("NUMBA_NUM_THREADS", "all")
    assert loader_threads(SEED, on_device, 128) == 9
    monkeypatch.setattr(setup.os, "sched_getaffinity", lambda process: range(128))
    monkeypatch.delenv("NUMBA_NUM_THREADS")
    assert loader_threads(SEED, on_device, 128) == 12
    asked = changes(settings=["loader.threads=20", "loader.slots=30"])(SEED)
    assert loader_threads(asked, on_host, 65536) == loader_threads(asked, on_device, 65536) == 20
    assert [loader_slots(config, 20) for config in (SEED, asked)] == [23, 30]


def test_the_mean_is_the_whole_picture_or_its_centre() -> None:
    mean = np.random.default_rng(1).random((72, 72, 3), dtype=np.float32)

    def prepared(which: str) -> np.ndarray:
        config = changes(settings=["preprocess.size=72", "input.crop=67", f"input.mean={which}"])(SEED)
        return setup.preparation(config, mean, reference, jittered=False).mean

    assert np.array_equal(prepared("image"), mean)
    assert np.array_equal(prepared("center"), mean[2:69, 2:69])
    assert prepared("none") is None


def test_settings_name_the_layers_of_the_network() -> None:
    """``pipeline`` knows no layer, and so it has a list of its own."""
    names = [layer.names for layer in setup.network_layers(load_config("seed"), 10) if layer.names]
    assert names == [(f"{layer}.w", f"{layer}.b") for layer in LAYERS]
    for recipe in RECIPES.values():
        assert len(recipe.network.weight_std) == len(recipe.network.bias) == len(LAYERS)


def test_rates_and_jitter_of_the_authors_code() -> None:
    """Weights' rate falls at 25, 51 and 79; biases' never; conv1 slows at 67 and stops at 72; the jitter ends at 67."""
    config = load_config("original")
    names = ["conv1.w", "conv1.b", "conv2.w", "conv2.b"]
    rates = {epoch: setup.learning_rates(config, names, epoch).tolist() for epoch in (0, 24, 25, 50, 51, 78, 79)}
    for epoch, rate in ((0, 0.01), (24, 0.01), (25, 0.001), (50, 0.001), (51, 1e-4)):
        assert rates[epoch] == pytest.approx([rate, 0.02, rate, 0.02], rel=1e-6), epoch
    assert rates[78][2:] == pytest.approx([1e-4, 0.02], rel=1e-6)
    assert rates[79][2:] == pytest.approx([1e-5, 0.02], rel=1e-6)
    at = {epoch: setup.learning_rates(config, names, epoch)[0] for epoch in (66, 67, 71, 72, 90)}
    assert at[66] == pytest.approx(1e-4)
    assert 0 < at[67] < at[66]
    assert at[71] == at[67]
    assert at[72] == at[90] == 0
    assert [setup.jittered(config, epoch) for epoch in (0, 66, 67, 90)] == [True, True, False, False]
    assert setup.decays(config, names)["conv2.w"] == pytest.approx(5e-4)
    assert setup.decays(config, names)["conv2.b"] == 0
    biases_too = changes(settings=["train.bias_decay=true"])(config)
    assert setup.decays(biases_too, names)["conv2.b"] == pytest.approx(5e-4)
    assert setup.input_shape(config) == (227, 227, 3)  # 224 and the border
    mean = np.zeros((256, 256, 3), np.float32)
    scales = [setup.preparation(config, mean, reference, jittered=jittered).scale for jittered in (True, False)]
    assert scales == pytest.approx([1 / 1.1, 1])


def test_rates_of_caffes_biases_are_twice_the_weights() -> None:
    rates = setup.learning_rates(load_config("caffe"), ["fc6.w", "fc6.b"], 0)
    assert rates[1] == pytest.approx(2 * rates[0])
    assert setup.decays(load_config("caffe"), ["fc6.w", "fc6.b"])["fc6.b"] == 0
