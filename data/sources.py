"""Where the pictures come from: which form each split has, which classes there are, and a fingerprint of it all.

A source holds the three official archives, or folders ``train/`` and ``val/`` with a tar or a folder a class; each
split may have its own form. The validation pictures may also lie flat in ``val/``, beside the devkit or Kaggle's list
of what they show; and both folders as deep as Kaggle has them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from data import folders, ilsvrc, kaggle
from data.listing import SPLITS, Listing, Reject, digest, relabelled, text
from pipeline.errors import PipelineError
from pipeline.run_dir import fingerprint

_ARCHIVE: Final = {"train": ilsvrc.TRAIN, "val": ilsvrc.VAL}


@dataclass(frozen=True)
class ClassEntry:
    """A class: its WNID (or folder name), its names in words, the devkit's ID; ``None`` where not known."""

    wnid: str
    words: str | None
    devkit_id: int | None


@dataclass(frozen=True)
class Source:
    """All pictures of a source, listed; classes in sorted order."""

    root: Path
    classes: tuple[ClassEntry, ...]
    splits: dict[str, Listing]
    rejects: tuple[Reject, ...]  # what could not be listed
    notes: tuple[str, ...]  # sentences on what is there and not read, and on what is not there

    def fingerprint(self) -> str:
        """A hash of every picture's name, size and class; where the source lies does not matter."""
        return fingerprint([[c.wnid for c in self.classes], {name: digest(s) for name, s in self.splits.items()}])


def read_source(root: Path) -> Source:
    """List the pictures under ``root``.

    Raises
    ------
    PipelineError
        Nothing usable is there, something is missing, damaged or cut short, or the parts do not belong together.
    """
    forms = _forms(root)
    flat = _labels_of_flat(root, forms["val"])
    listed = kaggle.read_labels(flat) if flat is not None and flat.name == kaggle.LABELS else None
    devkit = ilsvrc.read_devkit(root / ilsvrc.DEVKIT) if (root / ilsvrc.DEVKIT).exists() else None
    if forms["train"].is_file() and devkit is not None:
        names = sorted(devkit.ids)
    else:
        names = list(folders.class_containers(forms["train"]))
    classes = _class_entries(root, names, devkit)
    splits: dict[str, Listing] = {}
    rejects: list[Reject] = []
    notes = _shadowed(root, forms, flat)
    for split, path in forms.items():
        note = None
        if path.is_dir() and (split == "train" or flat is None):
            splits[split], left_out, note = folders.index(path, split, names)
        elif split == "val" and listed is not None:
            label = kaggle.val_labels(listed, path, names, forms["train"])
            splits[split], left_out = folders.index_flat(path, split, label)
        else:
            assert devkit is not None  # _forms refuses an official archive without it, _labels_of_flat such a folder
            splits[split], left_out = _index_by_devkit(path, split, devkit, names, forms["train"])
        if len(splits[split]) == 0:
            raise PipelineError(f"{path} holds no pictures{_hint(note, left_out)}")
        if split == "train" and path.is_dir():
            _refuse_empty_class(path, names, splits[split], _hint(note, []))
        notes += [note] if note is not None else []
        rejects += left_out
    if flat is not None:
        labelled = len(listed.wnids) if listed is not None else len(devkit.ground_truth) if devkit is not None else 0
        if len(splits["val"]) < labelled:
            held = f"{forms['val']} holds {len(splits['val'])} of the {labelled} pictures"
            notes.append(f"{held} that {flat.name} has labels for")
    return Source(root, classes, splits, tuple(rejects), tuple(notes))


def stamp(root: Path, rejected: Iterable[str] = ()) -> list[list[object]]:
    """Names, sizes and times of the source's archives and class folders: equal stamps need no second listing.

    A folder's time does not tell of a picture written over in place, and asking for the times of all pictures would be
    that listing. ``rejected`` names files below ``root`` that are looked at all the same, if they are there.
    """
    paths: list[Path] = []
    forms = _forms(root)
    flat = _labels_of_flat(root, forms["val"])
    for split, path in forms.items():
        whole = path.is_file() or (split == "val" and flat is not None)
        paths += [path] if whole else list(folders.class_containers(path).values())
    if flat is not None and flat.name == kaggle.LABELS:
        paths.append(flat)
    if (root / ilsvrc.DEVKIT).exists():
        paths.append(root / ilsvrc.DEVKIT)
    status = [(path, path.stat()) for path in paths]
    for name in rejected:
        with contextlib.suppress(OSError, ValueError):  # it lies in an archive, is a broken link, or no name at all
            split, _, inside = name.partition("/")
            path = forms[split].parent / split / inside if split in forms else root / name
            status.append((path, path.stat()))
    return [[str(path.relative_to(root)), s.st_size, s.st_mtime_ns] for path, s in status]


def _forms(root: Path) -> dict[str, Path]:
    """Each split's archive or folder; a plain sentence where something is missing."""
    if not root.is_dir():
        raise PipelineError(f"the source {root} is not a folder; check --source")
    archives = [name for name in (*_ARCHIVE.values(), ilsvrc.DEVKIT) if (root / name).exists()]
    forms: dict[str, Path] = {}
    for split in SPLITS:
        if _ARCHIVE[split] in archives:
            forms[split] = root / _ARCHIVE[split]
        else:
            found = [folder for folder in split_folders(root, split) if folder.is_dir()]
            forms |= {split: found[0]} if found else {}
    missing = [split for split in SPLITS if split not in forms]
    if len(missing) == 2 and not archives:
        instead = "check --source"
        if (top := _kaggle_top(root)) is not None:
            instead = f"name {top} with --source, where Kaggle's tree begins"
        elif any(root.glob("[!.]*/")):  # pictures of one's own often lie in a folder a class, without splits
            instead += ", or sort the pictures of its folders into train/<class>/ and val/<class>/"
        raise PipelineError(
            f"{root} holds neither the ILSVRC-2012 archives ({ilsvrc.TRAIN}, {ilsvrc.VAL}, {ilsvrc.DEVKIT}) nor "
            f"folders train/ and val/ with a folder or a tar for each class; {instead}"
        )
    if any(path.is_file() for path in forms.values()) or (missing and archives):
        wanted = [_ARCHIVE[split] for split in missing]
        if ilsvrc.DEVKIT not in archives:
            wanted.append(ilsvrc.DEVKIT)
        if wanted:
            instead = f" (a folder {missing[0]}/ with a tar or folder a class would do as well)" if missing else ""
            have = ", ".join(archives)
            raise PipelineError(f"{root} has {have} but not {' and '.join(wanted)}; put it beside them{instead}")
    if missing:
        path = next(iter(forms.values()))
        there = path.relative_to(root)
        # What was measured on pictures to train on is not asked for where only weights from elsewhere are evaluated.
        instead = (
            ""
            if missing != ["train"] or folders.lies_flat(path)
            else (f", or to evaluate only a link in its place: ln -s val {shlex.quote(str(path.with_name('train')))}")
        )
        raise PipelineError(f"{root} has a folder {there}/ but no {there.with_name(missing[0])}/; add it{instead}")
    return forms


def split_folders(root: Path, split: str) -> tuple[Path, Path]:
    """Where a split's pictures may lie in folders; the first that is there is read."""
    return root / split, root / kaggle.FOLDER / split


def _shadowed(root: Path, forms: dict[str, Path], labels: Path | None) -> list[str]:
    """Sentences on folders, and on Kaggle's list, in whose place something else is read."""
    notes = []
    for split, path in forms.items():
        for folder in split_folders(root, split):
            if folder.is_dir() and not folder.samefile(path):
                here, read = folder.relative_to(root), path.relative_to(root)
                notes.append(f"the folder {here}/ is not read, because {read}{'/' * path.is_dir()} is there")
    if labels is not None and labels.name != kaggle.LABELS and (root / kaggle.LABELS).exists():
        notes.append(f"{kaggle.LABELS} is not read, because {labels.name} is there")
    return notes


def _kaggle_top(root: Path) -> Path | None:
    """The folder that holds Kaggle's tree, where ``root`` is a folder inside that."""
    here = root.resolve()
    tops = [top for top in here.parents if (top / kaggle.FOLDER).is_dir()]
    return next((top for top in tops if here.is_relative_to(top / kaggle.FOLDER.parts[0])), None)


def _labels_of_flat(root: Path, val: Path) -> Path | None:
    """The file that says what the pictures in a flat ``val/`` show; None where the split has another form."""
    if not val.is_dir() or not folders.lies_flat(val):
        return None
    for name in (ilsvrc.DEVKIT, kaggle.LABELS):
        if (root / name).exists():
            return root / name
    top = _kaggle_top(root)
    above = (
        "" if top is None or not (top / kaggle.LABELS).exists() else f"name {top} with --source, which has that file, "
    )
    raise PipelineError(
        f"the files in {val} are sorted into no classes, and nothing says what they show; put {ilsvrc.DEVKIT} or "
        f"Kaggle's {kaggle.LABELS} into {root}, {above}or sort the pictures into val/<class>/"
    )


def _index_by_devkit(
    path: Path, split: str, devkit: ilsvrc.Devkit, names: list[str], train: Path
) -> tuple[Listing, list[Reject]]:
    """List what the devkit labels, an official archive or a flat ``val/``.

    Labels index ``names``, the classes of the training pictures in ``train``.
    """
    if split == "train":
        listing, rejects = ilsvrc.index_train(path, devkit)
    elif path.is_file():
        listing, rejects = ilsvrc.index_val(path, devkit)
    else:
        listing, rejects = folders.index_flat(path, split, ilsvrc.val_labels(devkit, path))
    by_devkit, number = sorted(devkit.ids), {name: i for i, name in enumerate(names)}
    for label in np.unique(listing.label).tolist():
        if by_devkit[label] not in number:
            raise PipelineError(
                f"{path} holds pictures of the class {by_devkit[label]}, of which {train} has none; "
                "add its training pictures"
            )
    return relabelled(listing, np.array([number.get(name, -1) for name in by_devkit])), rejects


def _hint(note: str | None, rejects: list[Reject]) -> str:
    """Why pictures are missing: they often lie a folder too deep, or cannot be given a class."""
    said = [f"{reject.name}: {reject.reason}" for reject in rejects[:1]] + ([note] if note else [])
    return f" ({said[0]})" if said else ""


def _refuse_empty_class(folder: Path, names: list[str], listing: Listing, hint: str) -> None:
    counts = np.bincount(listing.label, minlength=len(names))
    for name, count in zip(names, counts.tolist(), strict=True):
        if count == 0:
            raise PipelineError(f"the class {name} in {folder} holds no pictures; add some or remove it{hint}")


def _class_entries(root: Path, names: list[str], devkit: ilsvrc.Devkit | None) -> tuple[ClassEntry, ...]:
    ids, words = ({}, {}) if devkit is None else (devkit.ids, devkit.words)
    if not all(name in words for name in names) and (root / kaggle.WORDS).exists():
        words = kaggle.read_words(root / kaggle.WORDS) | words
    # A folder's name may be any bytes.
    return tuple(ClassEntry(text(os.fsencode(name)), words.get(name), ids.get(name)) for name in names)
