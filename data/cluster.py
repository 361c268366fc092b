"""Shard tasks on a Dask cluster: other machines that see the same files under the same paths.

The scheduler hands each task to one worker, and to another one where that worker dies. joblib's Dask backend would give
the same with less code, but a task that the scheduler gives up leaves it waiting for ever (its callback is never
called), so Dask's own client is used; ``python -m tests.cluster.joblib_waits`` shows it.
"""

from __future__ import annotations

import socket
from collections.abc import Generator
from concurrent.futures import CancelledError
from typing import Any, Final
from urllib.parse import urlsplit

from data.convert import ShardResult, ShardTask, make_shard
from pipeline.errors import PipelineError
from pipeline.signals import StopRequest

PATIENCE: Final = 30  # seconds to find the scheduler, and to see a worker


def on_cluster(tasks: list[ShardTask], scheduler: str, stop: StopRequest) -> Generator[ShardResult, None, None]:
    """Finished shards as they come. After a signal no shard is begun, and those under way are finished.

    Raises
    ------
    PipelineError
        Dask is not installed, the scheduler cannot be reached or is lost, it has no workers, a task's workers died time
        and again, the scheduler or the workers cannot import this program, or the workers do not see the run directory.
    """
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise PipelineError("--scheduler needs Dask: python -m pip install '.[cluster]'") from error
    _require_listener(scheduler)
    with Client(scheduler, timeout=PATIENCE, set_as_default=False) as client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError as error:
            raise PipelineError(
                f"the scheduler at {scheduler} has no workers; in the checkout on each machine: "
                f"PYTHONPATH=. dask worker {scheduler}"
            ) from error
        todo = iter(tasks)
        under_way = as_completed(loop=client.loop)

        def begin() -> None:
            """As many tasks as there are threads on all workers, counted anew: workers may come and go."""
            wanted = max(1, sum(client.ncores().values()))
            while under_way.count() < wanted and stop.signum is None and (task := next(todo, None)) is not None:
                under_way.add(client.submit(make_shard, task, pure=False))

        begin()
        for future in under_way:
            yield _here(_result(future, scheduler))
            begin()


def _require_listener(scheduler: str) -> None:
    """Refuse an address at which nobody listens: Dask's client would try for long, and then end with a traceback."""
    try:
        parts = urlsplit(scheduler if "://" in scheduler else f"tcp://{scheduler}")
        if parts.scheme not in ("tcp", "tls") or not parts.hostname or not parts.port:
            raise ValueError("an address looks like tcp://host:8786")
        socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE).close()
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"no Dask scheduler answers at {scheduler} ({error}); start one in the checkout: "
            "PYTHONPATH=. dask scheduler"
        ) from error


def _result(future: Any, scheduler: str) -> ShardResult:
    from distributed import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        raise PipelineError(
            "one shard's workers were killed time and again, most likely because memory ran out; give the workers more "
            "memory (dask worker --memory-limit) or fewer threads (--nthreads); the finished shards are kept"
        ) from error
    except CancelledError as error:
        raise PipelineError(
            f"the scheduler at {scheduler} was lost; start it again and run the same command: the finished shards are "
            "kept"
        ) from error
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"a worker cannot import {error.name}; start the workers in the checkout, with PYTHONPATH=. and the same "
            "environment"
        ) from error
    except RuntimeError as error:  # what the scheduler could not unpack, as it does before the workers
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        raise PipelineError(
            f"the scheduler at {scheduler} cannot import this program ({error.__cause__}); start it, like the workers, "
            "in the checkout, with PYTHONPATH=. and the same environment"
        ) from error


def _here(result: ShardResult) -> ShardResult:
    """The result, where its file is to be seen from here."""
    if result.temporary is not None and not result.temporary.is_file():
        raise PipelineError(
            f"a worker wrote {result.temporary}, which is not to be seen here; --run and --source must be on a file "
            "system that all machines share under the same path"
        )
    return result
