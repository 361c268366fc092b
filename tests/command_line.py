"""The real command line, as tests use it: a process of its own, its exit status and what it printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The network on pictures of 67x67, the smallest that leaves something after the last pool, and with few units, a number
# that no vector or block divides: quick, but the same code.
QUICK = (
    "preprocess.size=72",
    "preprocess.shard_images=10",
    "input.crop=67",
    "input.border=[0,0]",
    "network.fc_units=250",
    "train.batch_size=4",
    "train.log_every=1",
    "eval.batch_size=8",
)


@dataclass(frozen=True)
class Result:
    """What a run of the command line left: exit status (negative: killed by that signal) and output."""

    status: int
    out: str
    err: str

    def done(self) -> Result:
        """Itself, if it ended well."""
        assert self.status == 0, f"exit status {self.status}\n{self.out}\n{self.err}"
        return self

    def refused(self, *patterns: str) -> str:
        """The one sentence of a plain failure with status 1; each pattern must be found in it."""
        assert self.status == 1, f"exit status {self.status}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.out + self.err, self.err
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        assert self.err.splitlines()[-1] == errors[0], self.err
        for pattern in patterns:
            assert re.search(pattern, errors[0]), f"{pattern!r} is not in {errors[0]!r}"
        return errors[0]


def start(*arguments: object, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    """Start ``python run_pipeline.py`` with these arguments; ``launcher`` stands before it on the command line."""
    inherited = {name: value for name, value in os.environ.items() if name != "ILSVRC2012_ROOT"}
    return subprocess.Popen(
        [*launcher, sys.executable, "-X", "faulthandler", "run_pipeline.py", *map(str, arguments)],
        cwd=ROOT,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 300) -> Result:
    """Wait for a started command line; one that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {seconds} s\n{out}\n{err}") from None
    return Result(process.returncode, out, err)


def pipeline(*arguments: object, launcher: tuple[str, ...] = (), **environment: str) -> Result:
    """Run ``python run_pipeline.py`` with these arguments to its end."""
    return finish(start(*arguments, launcher=launcher, **environment))


def settings(*values: str) -> list[str]:
    """``--set`` for each value."""
    return [part for value in values for part in ("--set", value)]


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until something is true of a process that is still running."""
    end = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
