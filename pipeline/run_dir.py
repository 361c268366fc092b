"""The run directory: paths, the lock, and writing files so that they are complete or not there.

Every file is written beside its final name, flushed to the disk, renamed, and the folder flushed too. A crash leaves
either the old file or the new one, at worst with a stray ``*.tmp`` that the next writer removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from pipeline.errors import PipelineError

_SEAL: Final = "sha256"
_CHUNK: Final = 4 << 20  # bytes read at a time


@dataclass(frozen=True)
class RunDir:
    """Paths of a run; nothing is created here."""

    root: Path

    @property
    def flag(self) -> str:
        """``--run`` with this directory, as a shell reads it."""
        return f"--run {shlex.quote(str(self.root))}"

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def preprocess(self) -> Path:
        return self.root / "preprocess"

    @property
    def train(self) -> Path:
        return self.root / "train"

    @property
    def eval(self) -> Path:
        return self.root / "eval"

    @property
    def report(self) -> Path:
        return self.root / "report"


def make_folder(path: Path) -> Path:
    """Create ``path`` and its parents; a plain sentence when that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
    return path


@contextlib.contextmanager
def locked(run: RunDir) -> Iterator[None]:
    """Hold the run directory's lock: one writer at a time.

    The lock is the kernel's (``flock``), so a process that dies releases it; the file's text only tells others who
    holds it. A directory that is made here is removed again where an error ends what holds it with nothing in it.

    Raises
    ------
    PipelineError
        Another process holds it, or the directory cannot be written.
    """
    new, path = not run.root.exists(), make_folder(run.root) / "lock"
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "a+", encoding="utf-8"))
        except OSError as error:
            raise write_error(path, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise PipelineError(
                f"{run.root} is in use by {holder}; wait for it to end, or give this run its own directory with --run"
            ) from error
        except OSError as error:
            raise PipelineError(
                f"{path} cannot be locked ({error.strerror}): its file system has no locks. Mount it with them "
                "(Lustre: the option flock; NFS: with a lock daemon), or choose a directory elsewhere with --run"
            ) from error
        if not _is_there(path, file.fileno()):  # whoever held it has just removed it
            raise PipelineError(f"{run.root} has just been removed by another process; run the same command again")
        os.ftruncate(file.fileno(), 0)
        try:
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            raise write_error(path, error) from error
        try:
            yield
        except BaseException:
            if new:
                _remove_unused(run.root, path)
            raise


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether an open file is what lies at ``path``. (NFS counts links of open files that are gone.)"""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_unused(root: Path, lock: Path) -> None:
    """Remove a run directory with nothing but its lock, which this process holds, and empty folders."""
    with contextlib.suppress(OSError):  # what failed before is what is told
        folders = [path for path in root.iterdir() if path != lock]
        if all(path.is_dir() and not any(path.iterdir()) for path in folders):
            for folder in folders:
                folder.rmdir()
            lock.unlink()
            root.rmdir()


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write`` with a temporary file beside ``path``, then put it in place durably.

    Raises
    ------
    PipelineError
        The disk is full, the folder is read-only, and the like; the old file, if any, is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def put_in_place(temporary: Path, path: Path) -> None:
    """Flush a finished temporary file to the disk and rename it to ``path``."""
    try:
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def remove(path: Path) -> None:
    """Remove a file that may be there."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def move_aside(folder: Path) -> Path:
    """Rename a folder to the first free ``<name>.old-N`` beside it and return that path."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    try:
        os.rename(folder, target)
        sync_folder(folder.parent)
    except OSError as error:
        raise write_error(target, error) from error
    return target


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (a rename, a removal) durable."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise write_error(folder, error) from error


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a whole file, atomically."""
    write_atomic(path, lambda file: file.write(content))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object; ``remedy`` ends the sentence told when the file is missing or damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError as error:
        raise PipelineError(f"{path} does not exist; {remedy}") from error
    except OSError as error:
        raise PipelineError(f"cannot read {path}: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path} is damaged (not valid JSON); {remedy}") from error
    if not isinstance(value, dict):
        raise PipelineError(f"{path} is damaged (no JSON object); {remedy}")
    return value


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with the SHA-256 of its contents as its last entry, atomically."""
    write_json(path, {**value, _SEAL: fingerprint(value)})


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """Read what :func:`write_sealed` wrote, without the checksum; any changed value is refused."""
    value = read_json(path, remedy)
    seal = value.pop(_SEAL, None)
    if seal != fingerprint(value):
        raise PipelineError(f"{path} does not match its own checksum: it was damaged or edited by hand; {remedy}")
    return value


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(path: Path, told: Callable[[int], object] = lambda count: None, algorithm: str = "sha256") -> str:
    """SHA-256, or another hash, of a file's bytes; ``told`` is called with their number as they are read."""
    digest, buffer = hashlib.new(algorithm, usedforsecurity=False), bytearray(_CHUNK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            told(count)
    return digest.hexdigest()


def write_error(path: Path, error: OSError) -> PipelineError:
    """One sentence for an operating-system error while writing ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PipelineError(f"the disk is full: cannot write {path}; free some space and run the same command again")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return PipelineError(
            f"no permission to write {path} ({error.strerror}); "
            "choose a writable directory with --run (copy the run there if it has begun), or mend the permissions"
        )
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return PipelineError(
            f"cannot write {path}: a file stands where a folder should be; choose another directory with --run"
        )
    return PipelineError(f"cannot write {path}: {error.strerror or error}")
