"""Training and evaluation shared by ranks that a real mpiexec starts: the same curve, the same figures, an orderly end.

22 training pictures in batches of 19: the parts are uneven, and every second batch has three pictures, so that one of
four ranks has none.

MPI is the one beside this Python: MPICH as ``pip install ".[test]"`` brings it, or Open MPI in an environment of
its own (docs/cluster.md has the command).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint import checkpoints, load_checkpoint, newest_sound
from pipeline.metrics import read_metrics
from tests.command_line import ROOT, Result, finish, pipeline, settings, start, wait_until

MPIEXEC = Path(sys.executable).with_name("mpiexec")


@pytest.fixture(autouse=True, scope="module")
def _mpi() -> None:
    if not MPIEXEC.exists():
        if os.environ.get("CI"):
            pytest.fail("mpich is not installed beside this python: pip install '.[test]'")
        pytest.skip("mpich is not installed beside this python: pip install '.[test]'")


OPEN_MPI = MPIEXEC.with_name("ompi_info").exists()
# Open MPI refuses root and more ranks than cores unless told.
MORE = (*(("--allow-run-as-root",) if os.geteuid() == 0 else ()), "--map-by", ":OVERSUBSCRIBE") if OPEN_MPI else ()
NUMBER = "OMPI_COMM_WORLD_RANK" if OPEN_MPI else "PMI_RANK"


def ranks(count: int) -> tuple[str, ...]:
    return (str(MPIEXEC), *MORE, "-n", str(count))


def refused(result: Result, pattern: str) -> str:
    """The sentence of a plain failure; Open MPI's launcher adds remarks of its own after it."""
    own = result.err.split("-" * 70)[0] if OPEN_MPI else result.err
    return Result(result.status, result.out, own).refused(pattern)


STEPS = 4  # two epochs
BATCH = settings("train.batch_size=19")


def train(run: Path, count: int, *arguments: object) -> Result:
    launcher = ranks(count) if count > 1 else ()
    return pipeline("--stage", "train", "--run", run, *BATCH, *arguments, launcher=launcher)


def copy(prepared: Path, folder: Path) -> Path:
    shutil.copytree(prepared, folder / "run")
    return folder / "run"


def newest(run: Path) -> Path:
    return checkpoints(run / "train")[-1]


def digest(run: Path) -> str:
    return hashlib.sha256(newest(run).read_bytes()).hexdigest()


def losses(run: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(run / "train" / "metrics.jsonl") if "loss" in r}


def agree(run: Path, one: Path) -> None:
    """The curve and the momenta of one process, within rounding.

    Until the end of the first epoch that is the last bits of float32. Sooner or later a unit whose input is nearly 0
    falls on the other side of ReLU, and from then on its own gradients differ in full.
    """
    expected, found = losses(one), losses(run)
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values())[:2], list(expected.values())[:2], rtol=1e-6)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)
    validated = [[r for r in read_metrics(each / "train" / "metrics.jsonl") if "top1" in r] for each in (run, one)]
    assert [r["step"] for r in validated[0]] == [r["step"] for r in validated[1]] == [2, 4]
    assert validated[0][0]["validation_loss"] == pytest.approx(validated[1][0]["validation_loss"], rel=1e-6)
    whole = load_checkpoint(newest(one)).arrays
    for name, value in load_checkpoint(newest(run)).arrays.items():
        assert np.linalg.norm(value - whole[name]) <= 0.05 * np.linalg.norm(whole[name]), name


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Path]:
    """Two epochs by one process."""
    run = copy(prepared, tmp_path_factory.mktemp("one"))
    train(run, 1, "--steps", STEPS).done()
    yield run
    shutil.rmtree(run)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Path]:
    """Two epochs by two ranks."""
    run = copy(prepared, tmp_path_factory.mktemp("two"))
    result = train(run, 2, "--steps", STEPS).done()
    assert "batch 19 shared by 2 ranks" in result.out
    assert result.out.count("trained to step 4") == 1, "only the first rank prints"
    yield run
    shutil.rmtree(run)


def test_two_ranks_are_one_process_within_rounding(two: Path, one: Path) -> None:
    agree(two, one)


def test_a_signal_to_the_job_saves_and_two_ranks_resume_to_the_same_bits(two: Path, run: Path) -> None:
    process = start("--stage", "train", "--run", run, "--steps", STEPS, *BATCH, launcher=ranks(2))
    wait_until(lambda: len(losses(run)) >= 1, process)
    number = signal.SIGUSR1 if OPEN_MPI else signal.SIGTERM  # Open MPI kills its ranks right after a SIGTERM
    process.send_signal(number)
    result = finish(process)
    assert result.status == 128 + number, result
    assert result.err.count("everything is saved; go on with:") == 1
    done = load_checkpoint(newest(run)).header["step"]
    assert 1 <= done < STEPS
    train(run, 2, "--resume", "--steps", STEPS - done).done()
    assert digest(run) == digest(two)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(run: Path) -> None:
    process = start("--stage", "train", "--run", run, "--steps", 1000, *BATCH, launcher=ranks(2))
    wait_until(lambda: len(losses(run)) >= 1, process)
    number = signal.SIGUSR1 if OPEN_MPI else signal.SIGTERM
    os.kill(process_of(run, 1), number)
    result = finish(process)
    assert result.status == 128 + number, result
    assert result.err.count("everything is saved; go on with:") == 1
    saved, complaints = newest_sound(run / "train")
    assert saved is not None
    assert not complaints
    assert max(losses(run)) <= saved.header["step"] < 1000


def test_a_killed_rank_ends_the_job_and_four_ranks_resume_where_two_were(run: Path, one: Path) -> None:
    every = settings("train.checkpoint_every=1")
    process = start("--stage", "train", "--run", run, "--steps", STEPS, *BATCH, *every, launcher=ranks(2))
    wait_until(lambda: (run / "train" / "latest.json").exists(), process)
    os.kill(process_of(run, 1), signal.SIGKILL)
    result = finish(process, 60)
    assert result.status not in (0, 143), result
    assert "signal 9" in result.out + result.err
    done = load_checkpoint(newest(run)).header["step"]
    assert 1 <= done < STEPS
    resumed = train(run, 4, "--resume", "--steps", STEPS - done).done()
    assert "so far a batch was shared by 2 ranks, from here on by 4" in resumed.out
    agree(run, one)


def test_a_rank_that_falls_silent_ends_the_job(run: Path) -> None:
    every = settings("train.checkpoint_every=1")
    command = ("--stage", "train", "--run", run, "--steps", 200, *BATCH, *every)
    process = start(*command, launcher=ranks(2), ALEXNET_SILENCE="4")
    wait_until(lambda: (run / "train" / "latest.json").exists(), process)
    silent = process_of(run, 1)
    os.kill(silent, signal.SIGSTOP)
    try:
        result = finish(process, 60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(silent, signal.SIGKILL)
    assert result.status not in (0, 143), result
    assert "rank 0 of 2, on " in result.err
    assert "has heard nothing of the others for 4 s" in result.err
    saved, complaints = newest_sound(run / "train")
    assert saved is not None
    assert not complaints


STUCK = """
import sys, time
sys.path.insert(0, {root!r})
import net.cpu, run_pipeline
uploads = []
def upload(arrays, real=net.cpu.upload):
    uploads.append(1)
    if len(uploads) == 2:
        time.sleep(600)
    return real(arrays)
net.cpu.upload = upload
sys.exit(run_pipeline.main())
"""


def test_a_device_that_waits_for_ever_ends_the_job(run: Path, tmp_path: Path) -> None:
    """As a GPU does whose NCCL hears nothing any more: the host waits for it when it brings the next batch."""
    script = tmp_path / "stuck.py"
    script.write_text(STUCK.format(root=str(ROOT)))
    options = ("--stage", "train", "--run", run, "--steps", 200, "--device", "cpu", *BATCH)
    command = [*ranks(2), sys.executable, script, *map(str, options)]
    environment = {**os.environ, "ALEXNET_SILENCE": "4"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "has heard nothing of the others for 4 s" in done.stderr


def process_of(run: Path, rank: int) -> int:
    """The process of a rank of the job that trains ``run``."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # a process that has ended meanwhile
            words, variables = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            if str(run).encode() in words and f"{NUMBER}={rank}".encode() in variables:
                return int(folder.name)
    raise AssertionError(f"rank {rank} is not there")


def test_evaluation_by_three_ranks_gives_the_same_bytes(one: Path, tmp_path: Path) -> None:
    written = {}
    for count in (1, 3):  # two batches: one rank has none
        run = tmp_path / str(count)
        run.mkdir()
        for folder in ("preprocess", "train"):
            (run / folder).symlink_to(one / folder)
        launcher = ranks(count) if count > 1 else ()
        pipeline("--stage", "eval", "--run", run, "--views", 10, launcher=launcher).done()
        names = ("predictions.npz", "per_class.csv")
        written[count] = [(run / "eval" / name).read_bytes() for name in names]
    assert written[1] == written[3]


def test_a_rank_that_fails_alone_says_so_and_ends_the_job(run: Path, tmp_path: Path) -> None:
    own = copy(run, tmp_path / "own")
    (own / "preprocess" / "manifest.json").unlink()
    first = (*ranks(1), sys.executable, "run_pipeline.py", "--stage", "train", "--run", str(run))
    result = pipeline("--stage", "train", "--run", own, launcher=(*first, ":", "-n", "1"))
    assert result.status not in (0, 143), result
    assert "rank 1 of 2, on " in result.err
    assert result.err.count("error: ") == 1
    assert f"{own}/preprocess" in result.err


def test_ranks_with_other_settings_are_refused_once(run: Path) -> None:
    first = (*ranks(1), sys.executable, "run_pipeline.py", "--stage", "train", "--run", str(run))
    result = pipeline("--stage", "train", "--run", run, "--seed", 5, launcher=(*first, ":", "-n", "1"))
    refused(result, "different data, settings or software: rank 1 of 2 differs from rank 0")
    assert not checkpoints(run / "train")


def test_other_stages_are_refused(run: Path) -> None:
    sentence = refused(pipeline("--stage", "preprocess", "--run", run, launcher=ranks(2)), "2 ranks can share")
    assert "--scheduler" in sentence
