"""The run directory: one writer, files complete or not there, plain sentences for what the disk refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, BinaryIO

import pytest

from pipeline import run_dir as r
from pipeline.errors import PipelineError
from tests.command_line import ROOT

HOLD = """
import sys, time
from pathlib import Path
from pipeline.run_dir import RunDir, locked
with locked(RunDir(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_lock_held_by_another_process_is_refused_and_left_alone(tmp_path: Path, holder: subprocess.Popen) -> None:
    run = r.RunDir(tmp_path)
    with pytest.raises(PipelineError, match=rf"{tmp_path} is in use by process {holder.pid} on .*--run"):
        with r.locked(run):
            pytest.fail("two processes hold the lock")
    assert f"process {holder.pid} " in (tmp_path / "lock").read_text()


def test_a_file_system_without_locks_is_told_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(r.fcntl, "flock", refuse)
    with pytest.raises(PipelineError, match=rf"{tmp_path}/lock cannot be locked \(Function not implemented\).*--run"):
        with r.locked(r.RunDir(tmp_path)):
            pytest.fail("a lock was taken")


def test_lock_of_a_killed_process_is_free(tmp_path: Path, holder: subprocess.Popen) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    (tmp_path / "lock").write_text("process 4194304 on a machine with a very long name\n")
    with r.locked(r.RunDir(tmp_path)):
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_new_directory_is_removed_after_an_error_where_nothing_is_in_it(tmp_path: Path) -> None:
    def hold(run: r.RunDir, made: str) -> None:
        with r.locked(run):
            r.make_folder(run.preprocess)
            if made:
                (run.root / made).write_text("kept")
            raise ValueError("told")

    def fail(run: r.RunDir, made: str) -> None:
        with pytest.raises(ValueError, match="told"):
            hold(run, made)

    fail(r.RunDir(tmp_path / "new"), "")
    assert not (tmp_path / "new").exists()
    for made in ("metrics.jsonl", "preprocess/metrics.jsonl"):
        fail(r.RunDir(tmp_path / made.replace("/", "-")), made)
        assert (tmp_path / made.replace("/", "-") / made).exists()
    (tmp_path / "mine").mkdir()
    fail(r.RunDir(tmp_path / "mine"), "")
    assert (tmp_path / "mine").exists()
    with r.locked(r.RunDir(tmp_path / "done")):
        pass
    assert (tmp_path / "done" / "lock").exists()


def test_a_lock_that_its_holder_has_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = r.fcntl.flock

    def too_late(file: IO[str], how: int) -> None:
        (tmp_path / "lock").rename(tmp_path / ".nfs0001")  # between the opening and this, as NFS does it
        flock(file, how)

    monkeypatch.setattr(r.fcntl, "flock", too_late)
    with pytest.raises(PipelineError, match="removed by another process; run the same command again"):
        with r.locked(r.RunDir(tmp_path)):
            pytest.fail("locked what no other process can see")


def test_lock_is_released_after_an_error(tmp_path: Path) -> None:
    run = r.RunDir(tmp_path)
    with pytest.raises(RuntimeError, match="inside"):
        with r.locked(run):
            raise RuntimeError("inside")
    with r.locked(run):
        pass


def test_write_atomic_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    r.write_atomic(path, lambda file: file.write(b"new") and None)
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), ValueError("broken"), KeyboardInterrupt()])
def test_failure_while_writing_keeps_the_old_file_and_no_temporary(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(PipelineError if isinstance(error, OSError) else type(error)):
        r.write_atomic(path, write)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_of_each_later_call_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(r.os, call, fail)
    with pytest.raises(PipelineError, match=r"cannot write .*a\.bin: Input/output error"):
        r.write_atomic(path, lambda file: file.write(b"new") and None)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_file_is_flushed_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        assert path.is_dir() or path.stat().st_size, "what Python still holds back is not flushed"
        done.append(("fsync", path.name))
        fsync(handle)

    def note_replace(old: Path, new: Path) -> None:
        done.append(("replace", new.name))
        replace(old, new)

    monkeypatch.setattr(r.os, "fsync", note_fsync)
    monkeypatch.setattr(r.os, "replace", note_replace)
    r.write_json(tmp_path / "a.json", {"x": 1})
    assert done == [("fsync", "a.json.tmp"), ("replace", "a.json"), ("fsync", tmp_path.name)]
    done.clear()
    (tmp_path / "b.tmp").write_bytes(b"shard")
    r.put_in_place(tmp_path / "b.tmp", tmp_path / "b.h5")
    assert done == [("fsync", "b.tmp"), ("replace", "b.h5"), ("fsync", tmp_path.name)]


def test_no_file_and_no_folder_stays_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    r.write_json(tmp_path / "a.json", {})
    (tmp_path / "b.tmp").write_bytes(b"shard")
    r.put_in_place(tmp_path / "b.tmp", tmp_path / "b.h5")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (OSError(errno.EPERM, "Operation not permitted"), "no permission to write"),
        (OSError("unsaid by the system"), "cannot write a: unsaid by the system"),
    ],
)
def test_what_the_disk_refuses_is_told_by_its_kind(error: OSError, told: str) -> None:
    assert str(r.write_error(Path("a"), error)).startswith(told)


def test_disk_full_is_told_plainly(small_disk: Path) -> None:
    (small_disk / "good").write_bytes(b"good")
    with pytest.raises(PipelineError, match=r"the disk is full: cannot write .*big\.bin; free some space"):
        r.write_atomic(small_disk / "big.bin", lambda file: file.write(bytes(4 << 20)) and None)
    assert os.listdir(small_disk) == ["good"]
    assert (small_disk / "good").read_bytes() == b"good"


def test_lock_on_a_full_disk_is_told_plainly(small_disk: Path) -> None:
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(PipelineError, match=r"the disk is full: cannot write .*lock"):
        with r.locked(r.RunDir(small_disk)):
            pytest.fail("locked on a full disk")


def test_read_only_file_system_is_told_plainly(read_only_disk: Path) -> None:
    with pytest.raises(PipelineError, match=r"no permission to write .*a\.json.*--run"):
        r.write_json(read_only_disk / "a.json", {})
    with pytest.raises(PipelineError, match=r"no permission to write .*/new"):
        r.make_folder(read_only_disk / "new")
    with pytest.raises(PipelineError, match=r"no permission to write .*lock"):
        with r.locked(r.RunDir(read_only_disk)):
            pytest.fail("locked on a read-only disk")


def test_folder_in_the_place_of_a_file_is_told_plainly(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(
            PipelineError, match=rf"cannot write {path}: a file stands where a folder should be; .*--run"
        ):
            r.make_folder(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "does not exist"),
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xff\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"[1]", "no JSON object"),
        ("folder", "cannot read"),
    ],
)
def test_json_that_cannot_be_read_is_named_with_its_remedy(tmp_path: Path, content: object, what: str) -> None:
    path = tmp_path / "a.json"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(PipelineError, match=what) as caught:
        r.read_json(path, "do this instead")
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("; do this instead")


def test_json_round_trip_refuses_nan(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "b": {"c": "ü"}}
    r.write_json(tmp_path / "a.json", value)
    assert r.read_json(tmp_path / "a.json", "") == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        r.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert r.read_json(tmp_path / "a.json", "") == value


def test_sealed_json_notices_every_changed_value(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"lr": 0.1, "epochs": [1, 2], "name": "ü"}
    r.write_sealed(path, value)
    assert r.read_sealed(path, "") == value
    for old, new in [("0.1", "0.2"), ("1", "3"), ("epochs", "epoch_"), ("sha256", "sha255"), ('"lr": 0.1,', "")]:
        text = path.read_text()
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(PipelineError, match=r"a\.json does not match its own checksum.*; do this"):
            r.read_sealed(path, "do this")
        path.write_text(text)


def test_removing_what_is_not_there_or_may_not_go(tmp_path: Path, read_only_disk: Path) -> None:
    r.remove(tmp_path / "none")
    with pytest.raises(PipelineError, match=r"cannot write .*disk"):
        r.remove(read_only_disk)


def test_fingerprint_sees_every_value_and_no_order() -> None:
    assert r.fingerprint({"a": 1, "b": [2]}) == r.fingerprint({"b": [2], "a": 1})
    assert r.fingerprint({"a": 1, "b": [2]}) != r.fingerprint({"a": 1, "b": [3]})
