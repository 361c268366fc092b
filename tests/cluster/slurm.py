"""Training under a real Slurm: ``python -m tests.cluster.slurm [SCENARIO ...]`` (not a test; about four minutes).

Needs root, MPICH beside this Python, and Slurm and MUNGE installed, not running (Debian: ``apt-get install slurmctld
slurmd slurm-client slurm-wlm-basic-plugins munge``). A cluster of its own is started: one controller and two "nodes",
slurmds of this machine with two cores each, on ports of the loopback only. It is gone afterwards. What each scenario
showed is in docs/cluster.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.checkpoint import load_checkpoint
from tests import pictures
from tests.cluster.test_mpi import BATCH, OPEN_MPI, STEPS, agree, copy, digest, losses, newest, process_of
from tests.command_line import QUICK, ROOT, Result, finish, pipeline, settings, start, wait_until

PORT = 16817
EVERY = settings("train.checkpoint_every=1")
FOUR = (*EVERY, *settings("train.epochs=4"))  # eight steps
CONFIGURATION = """\
ClusterName=small
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={one} CPUs=2 CoresPerSocket=2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={two} CPUs=2 CoresPerSocket=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=abrupt Nodes=ALL PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


@contextlib.contextmanager
def slurm() -> Iterator[Path]:
    """A controller and two nodes, stopped at the end; their folder, with ``slurm.conf``."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # MUNGE asks for it
    key, file = folder / "key", folder / "slurm.conf"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (folder / "state").mkdir()
    file.write_text(
        CONFIGURATION.format(host=os.uname().nodename, folder=folder, port=PORT, one=PORT + 1, two=PORT + 2)
    )
    os.environ["SLURM_CONF"] = str(file)
    daemons = (
        ("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
         f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed"),
        ("slurmctld", "-D", "-c", "-f", str(file)),
        ("slurmd", "-D", "-N", "node1", "-f", str(file)),
        ("slurmd", "-D", "-N", "node2", "-f", str(file)),
    )  # fmt: skip
    started = []
    try:
        for daemon in daemons:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            started.append(subprocess.Popen(daemon, cwd=folder, **quiet))
            time.sleep(1)
        wait_for(lambda: said("sinfo", "-h", "-N", "-p", "low", "-o", "%t").split() == ["idle"] * 2)
        yield folder
    finally:
        if len(started) == len(daemons):
            said("scancel", "--signal=KILL", "--full", "--state=RUNNING", "-u", "root")
            time.sleep(1)
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(20)
        shutil.rmtree(folder)


def said(*command: str) -> str:
    """What a command of Slurm's prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip()


def wait_for(holds: Callable[[], bool], seconds: float = 60) -> float:
    """Wait until something holds; the seconds it took."""
    begin = time.monotonic()
    while not holds():
        if time.monotonic() - begin > seconds:
            raise AssertionError(f"waited {seconds} s in vain")
        time.sleep(0.05)
    return time.monotonic() - begin


def srun(tasks: int, *options: str) -> tuple[str, ...]:
    """The command of docs/cluster.md for so many tasks, half of them on each node."""
    shared = ("-N", "2", "-n", str(tasks), "--mpi=pmi2", "--kill-on-bad-exit=1", *options)
    return ("srun", "--quiet", *shared)


def train(run: Path, tasks: int, *arguments: object) -> Result:
    return pipeline("--stage", "train", "--run", run, *BATCH, *arguments, launcher=srun(tasks) if tasks > 1 else ())


def batch(folder: Path, run: Path, partition: str) -> str:
    """A job that trains by two tasks, as docs/cluster.md has it; its number."""
    script, log = folder / "job.sh", folder / "job.log"
    log.unlink(missing_ok=True)
    words = ("--stage", "train", "--resume", "--run", run, *BATCH, *FOUR)
    command = " ".join(map(str, (*srun(2), sys.executable, "run_pipeline.py", *words)))
    again = "[ $status = 143 ] && scontrol requeue $SLURM_JOB_ID"
    script.write_text(f"#!/bin/bash\n{command}\nstatus=$?\n{again}\nexit $status\n")
    submit = ("sbatch", "--parsable", "-p", partition, "-N2", "-n2", "--requeue", "--open-mode=append", "-o", str(log))
    job = said(*submit, "-D", str(ROOT), str(script))
    wait_for(lambda: (run / "train" / "metrics.jsonl").exists() and len(losses(run)) >= 1)
    return job


def state(job: str) -> str:
    return re.search(r"JobState=(\w+)", said("scontrol", "show", "job", job))[1]


def binding(folder: Path, prepared: Path) -> None:
    words = "echo $SLURMD_NODENAME rank $PMI_RANK of $PMI_SIZE: cores $(taskset -pc $$)"
    for tasks, options in ((4, ()), (2, ("--cpus-per-task=2",))):
        print("\n".join(sorted(said(*srun(tasks, *options), "sh", "-c", words).splitlines())))


def curve(folder: Path, prepared: Path) -> None:
    """One process, two tasks twice, four tasks: the same curve; the same bits for the same number."""
    runs = {name: copy(prepared, folder / name) for name in ("1", "2", "2 again", "4")}
    for name, run in runs.items():
        begin = time.monotonic()
        train(run, int(name[0]), "--steps", STEPS).done()
        print(f"{name}: {time.monotonic() - begin:.1f} s, losses {[round(x, 6) for x in losses(run).values()]}")
    for name in ("2", "4"):
        agree(runs[name], runs["1"])
    assert digest(runs["2"]) == digest(runs["2 again"])
    written = {}
    for tasks in (2, 3):
        pipeline("--stage", "eval", "--views", 10, "--run", runs["1"], launcher=srun(tasks)).done()
        written[tasks] = [(runs["1"] / "eval" / n).read_bytes() for n in ("predictions.npz", "per_class.csv")]
    assert written[2] == written[3]
    print("agree; two tasks twice: the same bits; eval by two and three tasks: the same bytes")


def killed(folder: Path, prepared: Path) -> None:
    """One of two tasks is killed; four go on."""
    run = copy(prepared, folder / "killed")
    process = start("--stage", "train", "--run", run, "--steps", STEPS, *BATCH, *EVERY, launcher=srun(2))
    wait_until(lambda: (run / "train" / "latest.json").exists(), process)
    os.kill(process_of(run, 1), signal.SIGKILL)
    begin = time.monotonic()
    result = finish(process, 60)
    print(
        f"killed: srun ended after {time.monotonic() - begin:.1f} s with {result.status}: {result.err.splitlines()[-1]}"
    )
    done = load_checkpoint(newest(run)).header["step"]
    resumed = train(run, 4, "--resume", "--steps", STEPS - done).done()
    assert "so far a batch was shared by 2 ranks, from here on by 4" in resumed.out
    print(f"killed: four tasks went on from step {done}")


def cancelled(folder: Path, prepared: Path) -> None:
    """scancel of a batch job: saved, not started again, and resumed to the same bits."""
    run = copy(prepared, folder / "cancelled")
    job = batch(folder, run, "low")
    said("scancel", job)
    took = wait_for(lambda: state(job) not in ("RUNNING", "COMPLETING"))
    print(f"scancel: {state(job)} after {took:.1f} s, saved at step {load_checkpoint(newest(run)).header['step']}")
    assert state(job) == "CANCELLED"
    assert "everything is saved" in (folder / "job.log").read_text()
    train(run, 2, "--resume", *FOUR).done()
    assert digest(run) == whole(folder, prepared)
    print("scancel: resumed to the same bits")


def preempted(folder: Path, prepared: Path) -> None:
    """A job of higher priority takes the nodes; afterwards the first is started again, and goes on."""
    for partition in ("low", "abrupt"):
        run = copy(prepared, folder / partition)
        job = batch(folder, run, partition)
        begin = time.monotonic()
        said("srun", "-p", "high", "-N2", "-n4", "true")
        print(f"{partition}: the other job had run after {time.monotonic() - begin:.1f} s, {job} is {state(job)}")
        wait_for(lambda job=job: state(job) == "PENDING")
        # Slurm lets it wait for two minutes. At once, what is left of the first start can take the second for itself.
        time.sleep(20)
        said("scontrol", "update", f"JobId={job}", "StartTime=now")
        took = wait_for(lambda job=job: state(job) not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), 80)
        log = [line for line in (folder / "job.log").read_text().splitlines() if re.match("resumed|stopped", line)]
        print(f"{partition}: {state(job)} {took:.1f} s later;", *log, sep="\n  ", flush=True)
        assert state(job) == "COMPLETED", (folder / "job.log").read_text()
        assert digest(run) == whole(folder, prepared)
        print(f"{partition}: the same bits as without a stop", flush=True)


def whole(folder: Path, prepared: Path) -> str:
    """The digest of the same training by two tasks without a stop."""
    run = folder / "whole" / "run"
    if not run.exists():
        train(copy(prepared, run.parent), 2, *FOUR).done()
    return digest(run)


SCENARIOS = {f.__name__: f for f in (binding, curve, killed, cancelled, preempted)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster.slurm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "scenarios", nargs="*", metavar="SCENARIO", help=f"one of {', '.join(SCENARIOS)}; all if left out"
    )
    scenarios = parser.parse_args().scenarios
    if unknown := [name for name in scenarios if name not in SCENARIOS]:
        parser.error(f"there is no scenario {unknown[0]}, only {', '.join(SCENARIOS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # the daemons too are stopped
    if OPEN_MPI:
        sys.exit("MPICH only: Open MPI's ranks, started by --mpi=pmix, did not start on two slurmds of one machine")
    with tempfile.TemporaryDirectory() as name, slurm():
        folder = Path(name)
        source, prepared = pictures.draw(folder / "source"), folder / "prepared"
        pipeline("--stage", "preprocess", "--source", source, "--run", prepared, "--jobs", 1, *settings(*QUICK)).done()
        print(said("srun", "--version"), flush=True)
        for scenario in scenarios or SCENARIOS:
            print(f"--- {scenario}", flush=True)
            SCENARIOS[scenario](folder, prepared)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
