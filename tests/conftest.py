"""Shared fixtures: where the real pictures lie, and a small run preprocessed once for all tests that need one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import QUICK, ROOT, pipeline, settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in what a script starts with `&`; the command line under test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real pictures beside the checkout; skips without it, fails without it where CI is set."""
    if SHARED_DATA.is_dir():
        return SHARED_DATA
    message = f"the real pictures are missing: {SHARED_DATA} does not exist"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def ilsvrc_mini(shared_data: Path) -> Path:
    """The three official archives with few members."""
    return shared_data / "ilsvrc-mini"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    yield from _mounted(tmp_path, "size=1m")


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system that takes no writes; mode bits would not stop root."""
    yield from _mounted(tmp_path, "ro,size=1m")


def _mounted(folder: Path, options: str) -> Iterator[Path]:
    path = folder / "disk"
    path.mkdir()
    with mounted(path, options):
        yield path


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[None]:
    """Mount a small file system in memory on ``path``; skips the test where mounting is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="session")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes of drawn pictures, 22 to train on and 13 to validate with, as folders of PNG files."""
    from tests import pictures  # and h5py with it, which a machine lent for its GPU may lack: tests/gpu goes without

    return pictures.draw(tmp_path_factory.mktemp("pictures") / "source")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, small_source: Path) -> Path:
    """A run whose pictures are preprocessed, with quick settings; tests work on copies of it."""
    run = tmp_path_factory.mktemp("prepared") / "run"
    pipeline("--stage", "preprocess", "--source", small_source, "--run", run, "--jobs", 1, *settings(*QUICK)).done()
    return run


@pytest.fixture
def run(tmp_path: Path, prepared: Path) -> Iterator[Path]:
    """A preprocessed run of the test's own, removed afterwards: a checkpoint takes 20 MB."""
    path = tmp_path / "run"
    shutil.copytree(prepared, path)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Path]:
    """A run trained for two epochs and evaluated with ten views; tests only read it."""
    path = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(prepared, path)
    # With a ReLU after the last layer, few steps can leave every score at 0: nothing to tell pictures apart by.
    changed = ("train.lr=[[0,0.005],[1,0.001]]", "train.keep_checkpoints=1", "network.final_relu=false")
    pipeline("--stage", "train", "--run", path, "--epochs", 2, *settings(*changed)).done()
    pipeline("--stage", "eval", "--run", path, "--views", 10).done()
    yield path
    shutil.rmtree(path, ignore_errors=True)
