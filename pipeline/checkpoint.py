"""Checkpoints: arrays and a small header in one file, complete or not there, checked before use.

A checkpoint is a safetensors file: a JSON header and the raw arrays, no pickle, readable by other programs. Its
metadata holds our own header (step, epoch, what the run was) and a SHA-256 over that header and all arrays, so that
any damaged byte is noticed. ``latest.json`` names the newest and ``best.json`` the best by validation; each is
written after the file it names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir, make_folder, read_sealed, remove, sync_folder, write_atomic, write_sealed

Arrays = dict[str, np.ndarray]
_SEAL: Final = "sha256"
_NAME: Final = re.compile(r"step-(\d{8,})\.ckpt")
_OTHER: Final = "choose another with --checkpoint, or let --stage train --resume go on from an older one"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read: its file, the JSON header, and the arrays by name, float32."""

    path: Path
    header: dict[str, Any]
    arrays: Arrays
    seal: str  # the checksum of header and arrays: no other checkpoint has it


def save_checkpoint(
    folder: Path,
    step: int,
    header: dict[str, Any],
    arrays: Mapping[str, Any],
    to_host: Callable[[str, Any], np.ndarray] = lambda name, array: np.asarray(array),
) -> Path:
    """Write ``step-<step>.ckpt`` into ``folder`` and point ``latest.json`` at it.

    ``arrays`` are float32 and may lie on a device: ``to_host`` turns each, given its name, into a NumPy array. They are
    fetched, hashed and written one after the other, so that no second copy of them all is ever in memory; what
    ``to_host`` raises leaves no file behind.
    """
    path = make_folder(folder) / f"step-{step:08d}.ckpt"
    header = {**header, "step": step}
    names = sorted(arrays)

    def write(file: BinaryIO) -> None:
        file.write(_head({**header, _SEAL: "0" * 64}, arrays))  # as long as with the checksum known at the end
        digest = hashlib.sha256(_canonical(header).encode())
        for name in names:
            array = np.ascontiguousarray(to_host(name, arrays[name]))
            file.write(_add(digest, name, array))
            del array  # before the next one is fetched
        file.seek(0)
        file.write(_head({**header, _SEAL: digest.hexdigest()}, arrays))

    write_atomic(path, write)
    note_latest(folder, path)
    return path


def _head(header: dict[str, Any], arrays: Mapping[str, Any]) -> bytes:
    """What precedes the arrays' bytes in a safetensors file: the length of its JSON, and that.

    Written here because safetensors' own writer wants all arrays at once, and copies them twice.
    """
    # One entry, because safetensors' readers hand out several in no fixed order.
    entries: dict[str, Any] = {"__metadata__": {"header": _canonical(header)}}
    at = 0
    for name in sorted(arrays):
        if arrays[name].dtype != np.float32:
            raise ValueError(f"a checkpoint holds float32 arrays only, and {name} is {arrays[name].dtype}")
        end = at + 4 * math.prod(arrays[name].shape)
        entries[name] = {"dtype": "F32", "shape": list(arrays[name].shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def load_checkpoint(path: Path, remedy: str = _OTHER) -> Checkpoint:
    """Read a checkpoint and check every byte of it; ``remedy`` ends the sentence told when it cannot be used.

    Raises
    ------
    PipelineError
        The file is missing, cut short, damaged, or no checkpoint of ours.
    """
    damaged = f"the checkpoint {path} is damaged"
    try:
        _read_through(path)
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict: it has no __iter__
    except FileNotFoundError as error:
        raise PipelineError(f"there is no checkpoint {path}; {remedy}") from error
    except OSError as error:
        raise PipelineError(f"cannot read the checkpoint {path}: {error.strerror or error}; {remedy}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(f"{damaged} or no checkpoint of this program ({error}); {remedy}") from error
    try:
        header = json.loads(metadata["header"])
        seal = header.pop(_SEAL)
        if type(header["step"]) is not int or header["step"] < 0:
            raise ValueError("no step")
        sound = seal == _digest(header, arrays)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PipelineError(
            f"{damaged} or no checkpoint of this program: its header names no step; {remedy}"
        ) from error
    odd = [name for name, array in arrays.items() if array.dtype != np.float32]
    if odd:
        raise PipelineError(f"{path} is no checkpoint of this program: {odd[0]} is not float32; {remedy}")
    if not sound:
        raise PipelineError(f"{damaged}: its contents do not match its checksum; {remedy}")
    return Checkpoint(path, header, arrays, seal)


def _read_through(path: Path) -> None:
    """Read a file once, from one end to the other.

    ``safe_open`` maps it, and where a disk cannot read mapped bytes the process dies; here that is an OSError.
    """
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(4 << 20)
        while file.readinto(buffer):
            pass


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoint files of a run, oldest first."""
    found = [path for path in folder.glob("step-*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's file name, -1 for another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def newest_sound(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that passes its check, and what was wrong with newer ones."""
    complaints: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return load_checkpoint(path, "an older checkpoint is tried instead"), complaints
        except PipelineError as error:
            complaints.append(str(error))
    return None, complaints


def chosen_checkpoint(folder: Path, which: str) -> Checkpoint:
    """The checkpoint that ``latest`` or ``best`` stands for, or the one at the path given.

    Where ``latest.json`` is gone it is the newest sound one, as for ``--resume``, and a line says so on standard error:
    standard output may belong to a stage's results.
    """
    index = folder / "latest.json"
    if which != "latest" or index.exists() or not checkpoints(folder):
        return load_checkpoint(find_checkpoint(folder, which))
    saved, complaints = newest_sound(folder)
    for complaint in complaints:
        print(f"warning: {complaint}", file=sys.stderr)
    if saved is None:
        raise PipelineError(
            f"no checkpoint in {folder} can be read; name another with --checkpoint PATH, or start over with: "
            f"python run_pipeline.py --stage train --restart {RunDir(folder.parent).flag}"
        )
    print(f"{index} is missing: the newest sound checkpoint is {saved.path}", file=sys.stderr)
    return saved


def find_checkpoint(folder: Path, which: str) -> Path:
    """The file ``latest`` or ``best`` stands for, or the path given."""
    if which not in ("latest", "best"):
        path = Path(which)
        if not path.exists() and path.name == which and (folder / which).is_file():  # as eval's metrics.json has it
            raise PipelineError(f"there is no checkpoint {which} in this folder; did you mean {folder / which}?")
        return path
    index = folder / f"{which}.json"
    if not checkpoints(folder):
        raise PipelineError(
            f"there is no checkpoint in {folder}; "
            f"train first: python run_pipeline.py --stage train {RunDir(folder.parent).flag}"
        )
    remedy = "name a checkpoint file with --checkpoint PATH instead"
    if which == "latest":
        remedy += ", or remove it, and the newest sound one is taken"
    elif not index.exists():
        raise PipelineError(
            f"{index} does not exist: no epoch has been validated, or it was lost and "
            f"python run_pipeline.py --stage train --resume {RunDir(folder.parent).flag} writes it anew; {remedy}"
        )
    return folder / _read_index(index, remedy)["checkpoint"]


def note_latest(folder: Path, path: Path) -> None:
    """Point ``latest.json`` at the checkpoint ``path``."""
    write_sealed(folder / "latest.json", {"checkpoint": path.name, "step": step_of(path)})


def best_of(folder: Path) -> dict[str, Any] | None:
    """The contents of ``best.json`` (checkpoint, step, top1), None before the first validation."""
    path = folder / "best.json"
    if not path.exists():
        return None
    return _read_index(
        path, f"remove it and go on with: python run_pipeline.py --stage train --resume {RunDir(folder.parent).flag}"
    )


def note_best(folder: Path, path: Path, step: int, top1: float) -> None:
    """Point ``best.json`` at ``path`` if its accuracy beats the best so far; ties keep the earlier one."""
    best = best_of(folder)
    # A run resumed from an older checkpoint validates the same epoch again: the entry of a later step is void.
    if best is None or best["step"] >= step or top1 > best["top1"]:
        write_sealed(folder / "best.json", {"checkpoint": path.name, "step": step, "top1": top1})


def restore_best(folder: Path, newest: Path) -> None:
    """Write a missing ``best.json`` anew, from what the checkpoints up to ``newest`` say of their validation.

    So too where its checkpoint is gone: ``verify`` has damaged ones removed.
    """
    best = best_of(folder)
    if best is not None and (folder / best["checkpoint"]).exists():
        return
    remove(folder / "best.json")
    for path in checkpoints(folder):
        if step_of(path) <= step_of(newest):
            with contextlib.suppress(SafetensorError, OSError, ValueError, KeyError, TypeError):  # a damaged one
                with safe_open(path, framework="numpy") as file:
                    validation = json.loads((file.metadata() or {})["header"])["validation"]
                if validation is not None:
                    note_best(folder, path, step_of(path), float(validation["top1"]))


def prune(folder: Path, keep: int, newest: Path) -> None:
    """Remove all but ``keep`` checkpoints up to ``newest``, which is known to be sound, and the best one.

    Later ones stay and count for nothing: the run went back behind them because they are damaged.
    """
    for path in superfluous(folder, keep, newest):
        remove(path)
    sync_folder(folder)


def superfluous(folder: Path, keep: int, newest: Path) -> list[Path]:
    """The files that :func:`prune` removes."""
    best = best_of(folder)
    sound = [path for path in checkpoints(folder) if step_of(path) <= step_of(newest)]
    return [path for path in sound[:-keep] if best is None or path.name != best["checkpoint"]] + strays(folder)


def strays(folder: Path) -> list[Path]:
    """What a crash left over: files that were never finished."""
    return list(folder.glob("*.tmp"))


def _read_index(path: Path, remedy: str) -> dict[str, Any]:
    """The entry of ``latest.json`` or ``best.json``."""
    entry = read_sealed(path, remedy)
    name = entry.get("checkpoint")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or entry.get("step") != step_of(path.with_name(name)):
        raise PipelineError(f"{path} names no checkpoint; {remedy}")
    return entry


def _canonical(header: dict[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, allow_nan=False)


def _digest(header: dict[str, Any], arrays: Arrays) -> str:
    digest = hashlib.sha256(_canonical(header).encode())
    for name in sorted(arrays):
        _add(digest, name, np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, array: np.ndarray) -> memoryview:
    """Add an array to the checksum; returns its bytes."""
    content = array.reshape(-1).view(np.uint8).data
    digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
    digest.update(content)
    return content
