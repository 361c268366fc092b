"""The ILSVRC-2012 archives as they were published: sizes, MD5 sums, numbers of pictures.

Inside the archives nothing tells a damaged picture from a sound one: a JPEG has no checksum, and zeros over the last
member of a tar look like its end. The sums find all of that, the numbers a missing picture.

Source: the sums stand on image-net.org's download page, and in torchvision's ``datasets/imagenet.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from data import ilsvrc
from data.sources import Source
from pipeline.errors import PipelineError
from pipeline.run_dir import hash_file

# Name -> bytes (None where not published), MD5.
ARCHIVES: Final[dict[str, tuple[int | None, str]]] = {
    ilsvrc.TRAIN: (147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e"),
    ilsvrc.VAL: (6_744_924_160, "29b22e2961454d5413ddabcf34fc5622"),
    ilsvrc.DEVKIT: (None, "fa75699e90414af021442c21a62c3abf"),
}
PICTURES: Final = {ilsvrc.TRAIN: 1_281_167, ilsvrc.VAL: 50_000}
CLASSES: Final = 1000


def archives_in(root: Path) -> list[Path]:
    """The official archives that lie in a folder."""
    return [root / name for name in ARCHIVES if (root / name).is_file()]


def check(path: Path, count: Callable[[int], None]) -> None:
    """Compare an archive with its published MD5 sum; ``count`` is told the bytes as they are read.

    Raises
    ------
    PipelineError
        It cannot be read, or is not the published file.
    """
    size, published = ARCHIVES[path.name]
    again = "it is cut short, damaged or another one; get it again, or leave out --check-archives if it is meant to be"
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            raise PipelineError(f"{path} has {found} bytes, the published archive {size}: {again}")
        digest = hash_file(path, count, "md5")
    except OSError as error:
        raise PipelineError(f"cannot read {path}: {error.strerror or error}") from error
    if digest != published:
        raise PipelineError(f"{path} has the MD5 sum {digest}, the published archive {published}: {again}")


def shortfalls(source: Source) -> list[str]:
    """Where an official archive of a thousand classes holds another number of pictures than the published one."""
    if len(source.classes) != CLASSES:
        return []
    found = []
    for listing in source.splits.values():
        name = listing.containers[0].name
        if name in PICTURES and len(listing) != PICTURES[name]:
            found.append(f"{listing.containers[0]} holds {len(listing)} of the {PICTURES[name]} published pictures")
    return found
