"""Pictures sorted into classes by folder or tar: ``train/<class>/*`` or ``train/<class>.tar``, the same for ``val/``.

The class's name is the folder's or the tar's, a WNID where the pictures are ImageNet's. A split may mix both forms.
ImageNet's validation pictures often lie flat in ``val/``; then something else says what they show.
Hidden files (``.DS_Store``, ``._x``) are left out. So are files beside the classes and folders inside a class's folder,
but a note tells of those.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from data import tar
from data.listing import Listing, Reject, Rows, text
from pipeline.errors import PipelineError


def class_containers(folder: Path) -> dict[str, Path]:
    """The classes of a split by sorted name, each with its folder or tar.

    Raises
    ------
    PipelineError
        The folder cannot be read, holds no class, or one class twice.
    """
    found: dict[str, Path] = {}
    for entry in _entries(folder):
        name = _class_name(entry)
        if name is None:
            continue
        if name in found:
            raise PipelineError(f"{folder} holds the class {name} twice, as a folder and as a tar; remove one of them")
        found[name] = folder / entry.name
    if not found:
        raise PipelineError(f"{folder} holds no classes: neither folders <class>/ nor archives <class>.tar are there")
    return dict(sorted(found.items()))


def index(folder: Path, split: str, classes: list[str]) -> tuple[Listing, list[Reject], str | None]:
    """List a split; labels index ``classes``. With it come the rejects, and a sentence on what was left out unread.

    Raises
    ------
    PipelineError
        A class that ``classes`` does not have, something that cannot be read, an archive that is cut short.
    """
    labels = {name: label for label, name in enumerate(classes)}
    rows = Rows(split)
    loose = [entry.name for entry in _entries(folder) if _class_name(entry) is None]
    inner: list[str] = []
    for name, path in class_containers(folder).items():
        if name not in labels:
            raise PipelineError(
                f"{path} is a class that the training pictures do not have; remove it, or add its training pictures"
            )
        if path.is_dir():
            inner += _index_folder(rows, path, name, labels[name])
        else:
            rows.containers.append(path)
            with tar.opened(path) as (read, stop):
                add_class_tar(rows, read, 0, stop, str(path), name, labels[name])
    return rows.listing(), rows.rejects, _unread(split, loose, inner)


def lies_flat(folder: Path) -> bool:
    """Whether a split's folder has files, but no class."""
    entries = _entries(folder)
    return bool(entries) and all(_class_name(entry) is None for entry in entries)


def index_flat(folder: Path, split: str, label: Callable[[bytes], int | str]) -> tuple[Listing, list[Reject]]:
    """List a folder that ``lies_flat``; ``label`` gives a picture's label by its name, or says why it has none."""
    rows = Rows(split, containers=[folder])
    for name, status in _statuses(rows, folder, ""):
        shown = label(os.fsencode(name))
        if isinstance(shown, str):
            rows.reject(os.fsencode(name), shown)
        else:
            rows.add(os.fsencode(name), shown, status.st_size)
    return rows.listing(), rows.rejects


def add_class_tar(rows: Rows, read: tar.Read, start: int, stop: int, where: str, class_name: str, label: int) -> None:
    """Add the pictures of a class's tar, which lies between bytes ``start`` and ``stop`` of the last container."""
    for member in tar.members(read, start, stop, where):
        name = member.name.rpartition(b"/")[2]
        full = os.fsencode(class_name) + b"/" + name
        if name.startswith(b"."):
            continue
        if member.kind != "file":
            rows.reject(full, f"it is {member.kind}")
        else:
            rows.add(full, label, member.size, member.offset)


def _index_folder(rows: Rows, folder: Path, class_name: str, label: int) -> list[str]:
    """Add the pictures of a class's folder; returns the folders inside it, as ``<class>/<folder>``."""
    rows.containers.append(folder)
    inner = []
    for name, status in _statuses(rows, folder, f"{class_name}/"):
        if stat.S_ISDIR(status.st_mode):
            inner.append(name)
        else:
            rows.add(os.fsencode(name), label, status.st_size)
    return inner


def _statuses(rows: Rows, folder: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    """The files and folders in a folder, named with ``prefix``; what is neither is rejected."""
    for entry in _entries(folder):
        name = prefix + entry.name
        try:
            status = entry.stat()
        except OSError as error:
            rows.reject(os.fsencode(name), f"its file cannot be reached ({error.strerror})")
            continue
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            yield name, status
        else:
            rows.reject(os.fsencode(name), "it is no regular file")


def _unread(split: str, loose: list[str], inner: list[str]) -> str | None:
    """What ``<split>/`` holds at places where no pictures are looked for, in a sentence; None if nothing."""
    counts = [
        f"{len(names)} {what if len(names) == 1 else several}, such as {text(os.fsencode(min(names)))}"
        for names, what, several in (
            (loose, "loose file", "loose files"),
            (inner, "folder inside a class folder", "folders inside class folders"),
        )
        if names
    ]
    if not counts:
        return None
    return f"{split}/ holds {', and '.join(counts)}: {'it is' if len(loose) + len(inner) == 1 else 'they are'} not read"


def _class_name(entry: os.DirEntry[str]) -> str | None:
    if entry.is_dir():
        return entry.name
    return entry.name.removesuffix(".tar") if entry.name.endswith(".tar") and entry.is_file() else None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise PipelineError(f"cannot read the folder {folder}: {error.strerror}") from error
