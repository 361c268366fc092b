"""Why data/cluster.py uses Dask's own client: ``python -m tests.cluster.joblib_waits`` (not a test; two minutes).

One of eight tasks kills its worker each time it is given to one. Dask's client then raises KilledWorker. joblib's Dask
backend is given 90 seconds, in which it says nothing; where it raises one day, data/cluster.py can be a few lines.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time

import joblib
from distributed import Client, KilledWorker, LocalCluster, as_completed

PATIENCE = 90  # seconds
TASKS = [(number, number == 3) for number in range(8)]


def work(number: int, deadly: bool) -> int:
    time.sleep(0.1)
    if deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def by_joblib() -> None:
    with joblib.parallel_config(backend="dask"):
        joblib.Parallel(batch_size=1)(joblib.delayed(work)(*task) for task in TASKS)


def by_client(client: Client) -> None:
    for future in as_completed([client.submit(work, *task, pure=False) for task in TASKS]):
        future.result()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster.joblib_waits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("way", nargs="?", choices=("joblib", "client"), help="this one alone, until it ends")
    chosen = parser.parse_args().way
    if chosen is None:
        for way in ("joblib", "client"):
            start = time.monotonic()
            try:
                command = [sys.executable, "-m", "tests.cluster.joblib_waits", way]
                done = subprocess.run(command, timeout=PATIENCE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                said = done.stdout.decode().strip() or f"nothing, status {done.returncode}"
            except subprocess.TimeoutExpired:
                said = "nothing so far"
            print(f"{way}: after {time.monotonic() - start:.1f} s: {said}", flush=True)
        return
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "host": "127.0.0.1"}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        try:
            by_joblib() if chosen == "joblib" else by_client(client)
        except KilledWorker:
            print("KilledWorker", flush=True)
        else:
            print("no error", flush=True)


if __name__ == "__main__":
    main()
