"""Preprocessing on a Dask cluster of separate worker processes: the same bytes, also where a worker is killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from data import cluster as cluster_module
from data.convert import ShardResult
from data.shards import Content
from pipeline.errors import PipelineError
from pipeline.metrics import read_metrics
from tests.command_line import QUICK, ROOT, Result, finish, pipeline, settings, start, wait_until

if not os.environ.get("CI"):  # there a missing package is a failure
    pytest.importorskip("distributed", reason="needs pip install '.[test]'")

from distributed import Client, KilledWorker

SHARDS = 35  # of one picture each
FINE = settings(*QUICK, "preprocess.shard_images=1")


@dataclass(frozen=True)
class Cluster:
    address: str
    workers: list[subprocess.Popen[bytes]]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with _cluster(tmp_path, scheduler_in=ROOT) as made:
        yield made


@contextlib.contextmanager
def _cluster(folder: Path, scheduler_in: Path) -> Iterator[Cluster]:
    """A scheduler and two workers, with one thread each, that listen on this machine only."""
    file = folder / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    local = ("--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(file))
    module = (sys.executable, "-m", "distributed.cli.dask_scheduler")
    started = [subprocess.Popen([*module, "--port", "0", *local], cwd=scheduler_in, **quiet)]
    try:
        end = time.monotonic() + 60
        while not (file.exists() and file.read_text().endswith("}")):
            assert time.monotonic() < end, "no scheduler"
            time.sleep(0.02)
        worker = (sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", *local)
        started += [subprocess.Popen(worker, cwd=ROOT, **quiet) for _ in range(2)]
        address = json.loads(file.read_text())["address"]
        with Client(address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)  # one that comes late would have no part in what a test does
        yield Cluster(address, started[1:])
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, small_source: Path) -> Path:
    """The same pictures preprocessed by one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    pipeline("--stage", "preprocess", "--source", small_source, "--run", run, "--jobs", 1, *FINE).done()
    return run


def made(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / "preprocess").iterdir() if p.name != "metrics.jsonl"}


def shards(run: Path) -> int:
    return sum("shard" in record for record in read_metrics(run / "preprocess" / "metrics.jsonl"))


def test_a_worker_killed_in_the_middle_costs_its_shard_and_the_bytes_are_the_same(
    cluster: Cluster, alone: Path, small_source: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    source = os.path.relpath(small_source, ROOT)  # the workers' folder need not be ours
    # Stopped, it holds one shard that nobody else makes before it is dead: the scheduler gives each worker one of the
    # first two, and from then on the other worker is the only one with nothing to do.
    cluster.workers[0].send_signal(signal.SIGSTOP)
    process = start("--stage", "preprocess", "--source", source, "--run", run, "--scheduler", cluster.address, *FINE)
    wait_until(lambda: shards(run) == SHARDS - 1, process)
    cluster.workers[0].kill()
    finish(process).done()
    assert shards(run) == SHARDS
    assert made(run) == made(alone)
    assert read_metrics(run / "preprocess" / "metrics.jsonl")[-1]["scheduler"] == cluster.address

    # What another Pillow would decode is refused on the worker. The other one is the one that asks.
    other = tmp_path / "other"
    code = "import sys, PIL.Image, run_pipeline; PIL.__version__ = '1.2.3'; sys.exit(run_pipeline.main(sys.argv[1:]))"
    arguments = ("--stage", "preprocess", "--source", small_source, "--run", other, "--scheduler", cluster.address)
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments), *FINE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert "decodes pictures with Pillow" in result.stderr
    assert "Pillow 1.2.3" in result.stderr


def test_a_signal_finishes_what_is_under_way_and_begins_no_more(
    cluster: Cluster, small_source: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for worker in cluster.workers:
        worker.send_signal(signal.SIGSTOP)
    arguments = ("--stage", "preprocess", "--source", small_source, "--run", run, "--scheduler", cluster.address)
    process = start(*arguments, *FINE)
    with Client(cluster.address, timeout=60, set_as_default=False) as client:
        wait_until(lambda: sum(map(len, client.processing().values())) == len(cluster.workers), process)
    process.terminate()
    for worker in cluster.workers:
        worker.send_signal(signal.SIGCONT)
    result = finish(process)
    assert result.status == 143, result
    assert "the same command goes on from there" in result.err
    assert shards(run) == len(cluster.workers)


def test_a_scheduler_outside_the_checkout_is_a_plain_sentence(small_source: Path, tmp_path: Path) -> None:
    with _cluster(tmp_path, scheduler_in=tmp_path) as outside:
        pipeline(
            *("--stage", "preprocess", "--source", small_source, "--run", tmp_path / "run"),
            *("--scheduler", outside.address, *FINE),
        ).refused(f"the scheduler at {outside.address} cannot import .*'data'.*in the checkout, with PYTHONPATH=.")


def test_a_scheduler_without_workers_is_a_plain_sentence(cluster: Cluster, small_source: Path, tmp_path: Path) -> None:
    for worker in cluster.workers:
        worker.kill()
    code = "import sys, data.cluster, run_pipeline; data.cluster.PATIENCE = 2; sys.exit(run_pipeline.main())"
    arguments = ("--stage", "preprocess", "--source", small_source, "--run", tmp_path, "--scheduler", cluster.address)
    command = [sys.executable, "-c", code, *map(str, arguments), *FINE]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    Result(result.returncode, result.stdout, result.stderr).refused(
        f"the scheduler at {cluster.address} has no workers; .* dask worker {cluster.address}"
    )


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KilledWorker("make_shard", None, 3), "workers were killed time and again, .*; the finished shards are kept"),
        (CancelledError(), "the scheduler at tcp://a:1 was lost; start it again and run the same command"),
        (ModuleNotFoundError("no", name="data"), r"a worker cannot import data; start .*PYTHONPATH=\."),
    ],
)
def test_what_ends_a_task_is_a_plain_sentence(error: Exception, told: str) -> None:
    future: Future[ShardResult] = Future()
    future.set_exception(error)
    with pytest.raises(PipelineError, match=told):
        cluster_module._result(future, "tcp://a:1")


def test_a_shard_that_is_not_to_be_seen_here_is_told(tmp_path: Path) -> None:
    content = Content(*[None] * len(fields(Content)))
    made = ShardResult("train-00000.h5", "train", tmp_path / "none.tmp", "", 0, content, 0.0, 0)
    with pytest.raises(PipelineError, match=r"none\.tmp, which is not to be seen here; --run and --source must be on"):
        cluster_module._here(made)
    (tmp_path / "none.tmp").touch()
    for temporary in (tmp_path / "none.tmp", None):
        assert cluster_module._here(replace(made, temporary=temporary)).temporary == temporary


def test_an_address_without_a_scheduler_is_a_plain_sentence(small_source: Path, tmp_path: Path) -> None:
    arguments = ("--stage", "preprocess", "--source", small_source, "--run", tmp_path / "run", *FINE)
    wrong = r"an address looks like tcp://host:8786"
    reasons = {"http://127.0.0.1:1": wrong, "tcp://:1": wrong, "127.0.0.1": wrong, "127.0.0.1:1": ".*refused"}
    for address, reason in reasons.items():
        with pytest.raises(
            PipelineError, match=rf"^no Dask scheduler answers at {re.escape(address)} \({reason}\); start"
        ):
            cluster_module._require_listener(address)
    for address in ("tcp://127.0.0.1:1", "somewhere"):
        pipeline(*arguments, "--scheduler", address).refused(
            rf"no Dask scheduler answers at {address} .*PYTHONPATH=\. dask scheduler"
        )
