"""Ranks and Dask workers on two "machines": ``python -m tests.cluster.machines [SCENARIO ...]`` (not a test).

Needs root, iproute2 and OpenSSH (Debian: ``apt-get install iproute2 openssh-server openssh-client``). A machine is a
network namespace with a host name, a /dev/shm and an sshd of its own; a bridge in a third namespace joins them, so
nothing can leave it. The file system is shared, as on a cluster. All is gone afterwards. What each scenario showed is
in docs/cluster.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint import load_checkpoint, newest_sound
from tests import pictures
from tests.cluster.test_dask import FINE, made
from tests.cluster.test_mpi import BATCH, MPIEXEC, OPEN_MPI, STEPS, agree, copy, digest, losses, newest
from tests.command_line import QUICK, ROOT, Result, finish, pipeline, settings, start, wait_until

NAMES = ("alexnet1", "alexnet2")
SWITCH = "alexnet-switch"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
SSHD = """\
ListenAddress {address}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
PidFile none
PasswordAuthentication no
UsePAM no
"""
SSH = """\
#!/bin/sh
exec ssh -i {folder}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \\
    -o ServerAliveInterval=5 -o ServerAliveCountMax=3 "$@"
"""


@dataclass(frozen=True)
class Machines:
    """Two machines: what to put before a command to run it on one, and how one reaches the other."""

    on: tuple[tuple[str, ...], ...]
    ssh: Path

    def ranks(self, count: int, *options: str) -> tuple[str, ...]:
        """mpiexec on the first machine, with half of the ranks on each."""
        each = count // 2
        hosts = ("-launcher", "ssh", "-launcher-exec", str(self.ssh), "-hosts", ",".join(ADDRESSES), "-ppn", str(each))
        return (*self.on[0], str(MPIEXEC), *hosts, *options, "-n", str(count))


def ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True)


def cable(number: int, state: str) -> None:
    """Plug a machine's cable in ("up") or out ("down"), at the switch."""
    ip("-n", SWITCH, "link", "set", f"port{number}", state)


def limit(rate: str | None) -> None:
    """So many bits a second from each machine, and from the switch to it."""
    for name, device in ((NAMES[0], "eth0"), (NAMES[1], "eth0")):
        at = ("tc", "-n", name, "qdisc")
        subprocess.run((*at, "del", "dev", device, "root"), check=False, stderr=subprocess.DEVNULL)
        if rate is not None:
            shape = ("tbf", "rate", rate, "burst", "4mb", "latency", "50ms")
            subprocess.run((*at, "add", "dev", device, "root", *shape), check=True)


def sent() -> int:
    """Bytes that both machines have sent."""
    show = [json.loads(subprocess.check_output(("ip", "-n", n, "-s", "-j", "link", "show", "eth0"))) for n in NAMES]
    return sum(device["stats64"]["tx"]["bytes"] for [device] in show)


@contextlib.contextmanager
def machines() -> Iterator[Machines]:
    folder = Path(tempfile.mkdtemp(prefix="machines-"))
    daemons = []
    try:
        for kind in ("host", "user"):
            subprocess.run(("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / kind)), check=True)
        (folder / "ssh").write_text(SSH.format(folder=folder))
        (folder / "ssh").chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)
        ip("netns", "add", SWITCH)
        ip("-n", SWITCH, "link", "add", "switch", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "switch", "up")
        for i, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            ip("netns", "add", name)
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{i}", "netns", SWITCH)
            ip("-n", SWITCH, "link", "set", f"port{i}", "master", "switch", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
            (folder / f"sshd{i}").write_text(SSHD.format(folder=folder, address=address))
            own = f"hostname {name}; mount -t tmpfs tmpfs /dev/shm; exec /usr/sbin/sshd -D -f {folder}/sshd{i}"
            apart = ("unshare", "--uts", "--ipc", "--mount", "sh", "-c", own)
            daemons.append(subprocess.Popen(("ip", "netns", "exec", name, *apart)))
        time.sleep(1)
        names = ("--net", "--uts", "--ipc", "--mount", f"--wd={ROOT}")
        yield Machines(tuple(("nsenter", "-t", str(d.pid), *names) for d in daemons), folder / "ssh")
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(10)
        listed = subprocess.check_output(("ip", "netns", "list"), text=True)
        for name in (*NAMES, SWITCH):
            if name in listed:
                for number in subprocess.check_output(("ip", "netns", "pids", name), text=True).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(number), signal.SIGKILL)
                ip("netns", "del", name)
        shutil.rmtree(folder)


def train(run: Path, launcher: tuple[str, ...], *arguments: object) -> Result:
    return pipeline("--stage", "train", "--run", run, *BATCH, *arguments, launcher=launcher)


def curve(two: Machines, folder: Path, prepared: Path) -> None:
    """The same curve by 2 and 4 ranks, the same bits again, and evaluation."""
    runs = {name: copy(prepared, folder / name) for name in ("1", "2", "2 again", "4")}
    for name, run in runs.items():
        before, begin = sent(), time.monotonic()
        train(run, two.ranks(int(name[0])) if name != "1" else (), "--steps", STEPS).done()
        wire = (sent() - before) / 1e6
        print(f"{name}: {time.monotonic() - begin:.1f} s, {wire:.0f} MB sent, losses {list(losses(run).values())}")
    for name in ("2", "4"):
        agree(runs[name], runs["1"])
    assert digest(runs["2"]) == digest(runs["2 again"])
    written = []
    for launcher in ((), two.ranks(2)):
        pipeline("--stage", "eval", "--views", 10, "--run", runs["1"], launcher=launcher).done()
        written.append([(runs["1"] / "eval" / n).read_bytes() for n in ("predictions.npz", "per_class.csv")])
    assert written[0] == written[1]
    print("agree; two ranks twice: the same bits; eval alone and by two ranks: the same bytes")


def working(run: Path) -> list[int]:
    """The ranks that train ``run``, on both machines."""
    found = []
    for name in NAMES:
        for number in subprocess.check_output(("ip", "netns", "pids", name), text=True).split():
            with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
                words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
                if str(run).encode() in words and words[1] == b"-X":
                    found.append(int(number))
    return found


def broken(two: Machines, folder: Path, prepared: Path) -> None:
    """The second machine's cable is pulled in the middle of training."""
    run = copy(prepared, folder / "broken")
    every = settings("train.checkpoint_every=1")
    command = ("--stage", "train", "--run", run, "--steps", 200, *BATCH, *every)
    process = start(*command, launcher=two.ranks(2), ALEXNET_SILENCE="15")
    wait_until(lambda: len(losses(run)) >= 2, process)
    cable(1, "down")
    begin = time.monotonic()
    number = len(working(run))
    while number and time.monotonic() - begin < 90:
        time.sleep(0.1)
        if len(working(run)) < number:
            number = len(working(run))
            print(f"{number} ranks left {time.monotonic() - begin:.1f} s after the cable was pulled", flush=True)
    assert not working(run)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    print(f"mpiexec {'is still there 20 s later' if process.poll() is None else 'has ended too'}")
    process.send_signal(signal.SIGTERM)
    result = finish(process, 20)
    print(f"status {result.status}:", *result.err.splitlines()[-6:], sep="\n  ")
    saved, complaints = newest_sound(run / "train")
    assert saved is not None
    print(f"newest checkpoint: step {saved.header['step']}, sound; {complaints}")
    cable(1, "up")
    time.sleep(3)
    resumed = train(run, two.ranks(2), "--resume", "--steps", 2, *every).done()
    assert f"step {saved.header['step']}" in resumed.out
    assert load_checkpoint(newest(run)).header["step"] == saved.header["step"] + 2
    print("resumed by two ranks with the cable back")


def dask(two: Machines, folder: Path, prepared: Path) -> None:
    """A scheduler on the first machine, a worker on each: the bytes of one process."""
    source, one, run = folder / "source", folder / "alone", folder / "dask"
    pipeline("--stage", "preprocess", "--source", source, "--run", one, "--jobs", 1, *FINE).done()
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    address = f"tcp://{ADDRESSES[0]}:8786"
    scheduler = (sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", ADDRESSES[0], "--no-dashboard")
    worker = (sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny")
    started = [subprocess.Popen((*two.on[0], *scheduler), **quiet)]
    started += [
        subprocess.Popen((*on, *worker, "--no-dashboard", "--host", host), **quiet)
        for on, host in zip(two.on, ADDRESSES, strict=True)
    ]
    try:
        time.sleep(4)
        begin = time.monotonic()
        words = ("--stage", "preprocess", "--source", source, "--run", run, "--scheduler", address, *FINE)
        pipeline(*words, launcher=two.on[0]).done()
        print(f"dask: {time.monotonic() - begin:.1f} s")
        assert made(run) == made(one)
        print("dask: the same bytes as by one process")
    finally:
        for process in started:
            process.kill()
            process.wait()


def rates(two: Machines, folder: Path, prepared: Path) -> None:
    """Seconds of the exchange and of a step of the full network, a core a rank, by the wire's rate."""
    for rate in (None, "10gbit", "1gbit"):
        limit(rate)
        for part in ("exchange alone", "without exchange", "step"):
            for progress in ("0", "1") if part == "step" else ("0",):
                before = sent()
                taken = bench(two, part, progress)
                middle, wire = statistics.median(taken), (sent() - before) / 1e6
                note = ", MPICH_ASYNC_PROGRESS=1" if progress == "1" else ""
                print(f"{rate or 'no limit'}, {part}{note}: {middle:.3f} s of {taken}, {wire:.0f} MB", flush=True)
    limit(None)


def bench(two: Machines, part: str, progress: str) -> list[float]:
    words = (sys.executable, "-m", "bench.scaling", "--worker", part, "--batch", "32", "--rounds", "3")
    environment = {"NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPICH_ASYNC_PROGRESS": progress}
    pinned = ("sh", "-c", f"exec taskset -c $((PMI_RANK % 2)) {shlex.join(words)}")
    done = subprocess.run(
        (*two.ranks(2), *pinned),
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=100,
    )
    return [round(seconds, 3) for seconds in json.loads(done.stdout.splitlines()[-1])]


SCENARIOS = {f.__name__: f for f in (curve, broken, dask, rates)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster.machines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "scenarios", nargs="*", metavar="SCENARIO", help=f"one of {', '.join(SCENARIOS)}; all if left out"
    )
    scenarios = parser.parse_args().scenarios
    if unknown := [name for name in scenarios if name not in SCENARIOS]:
        parser.error(f"there is no scenario {unknown[0]}, only {', '.join(SCENARIOS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # the machines too are taken down
    if OPEN_MPI:
        sys.exit("MPICH only: other launchers want other options")
    with tempfile.TemporaryDirectory() as name, machines() as two:
        folder = Path(name)
        source, prepared = pictures.draw(folder / "source"), folder / "prepared"
        pipeline("--stage", "preprocess", "--source", source, "--run", prepared, "--jobs", 1, *settings(*QUICK)).done()
        for scenario in scenarios or SCENARIOS:
            print(f"--- {scenario}", flush=True)
            SCENARIOS[scenario](two, folder, prepared)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
