"""The manifest: what preprocessing has made, file by file, and what every later stage relies on.

``manifest.json`` is written last, with a checksum of its own: sizes and SHA-256 of the shards, hashes of the files that
describe them, and fingerprints of the source, the settings and both together (docs/data.md). What has been found
damaged since is noted beside it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from data.listing import SPLITS
from data.origin import remedy
from data.shards import LABEL_ORDER, RULE, SCHEMA
from pipeline.errors import PipelineError
from pipeline.metrics import read_metrics
from pipeline.run_dir import RunDir, fingerprint, hash_file, read_sealed, remove, write_json

_NOTE: Final = "damaged.json"
_SHARD_NAME: Final = re.compile(r"(train|val)-\d{5}\.h5")


def read_manifest(run: RunDir) -> dict[str, Any]:
    """Read a run's manifest and check that all its files are there with their sizes.

    Raises
    ------
    PipelineError
        Preprocessing has not been done or not finished, or files are missing or replaced.
    """
    manifest = _sealed_manifest(run)
    for name, why in defects(run.preprocess, manifest).items():  # the first is enough
        raise PipelineError(f"{run.preprocess / name} {why}; {remedy(run)}")
    return manifest


def _sealed_manifest(run: RunDir) -> dict[str, Any]:
    mend = remedy(run)
    path = run.preprocess / "manifest.json"
    if not path.exists():
        raise PipelineError(f"{path} does not exist: preprocessing has not been finished; {mend}")
    manifest = read_sealed(path, f"remove it and {mend}")
    if not is_manifest(manifest):
        raise PipelineError(f"{path} is damaged or from another version of this program; remove it and {mend}")
    return manifest


def sound_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in a ``preprocess`` folder, None where there is none that can be used."""
    try:
        manifest = read_sealed(folder / "manifest.json", "")
    except PipelineError:
        return None
    return manifest if is_manifest(manifest) else None


def made_with(run: RunDir) -> dict[str, Any]:
    """The settings that a run's shards were made with; empty where nothing says so, as in older manifests.

    The manifest says so; where it is lost or damaged, the last line of metrics.jsonl does.
    """
    said = [record.get("made_with") for record in read_metrics(run.preprocess / "metrics.jsonl")]
    manifest = sound_manifest(run.preprocess)
    if manifest is not None:
        said.append(manifest.get("made_with", {}))
    made = next((entry for entry in reversed(said) if isinstance(entry, dict)), {})
    return {key: made[key] for key in ("seed", "preprocess") if key in made}


def data_fingerprint(manifest: dict[str, Any]) -> str:
    """A hash of a run's data, by which a checkpoint remembers what it was trained on.

    Without ``made_with``: ``settings`` is its hash, and older manifests lack it.
    """
    return fingerprint({key: value for key, value in manifest.items() if key != "made_with"})


def require_sound_description(run: RunDir, name: str) -> None:
    """Refuse ``classes.json`` or ``mean.npy`` where it is not what the manifest says; shards need not be there.

    Without a manifest, as where only these files were copied, there is nothing to compare with.
    """
    if not (run.preprocess / "manifest.json").exists():
        return
    path, digest = run.preprocess / name, _sealed_manifest(run)["files"].get(name)
    try:
        sound = digest is None or hash_file(path) == digest
    except OSError as error:
        raise PipelineError(f"{path} is missing ({error.strerror}); {remedy(run)}") from error
    if not sound:
        raise PipelineError(f"{path} is not the file that was written; {remedy(run)}")


def defects(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """The files that are missing or changed, each with what is wrong; shards by size only, small files by hash."""
    found: dict[str, str] = {}
    sizes = {entry["file"]: entry["bytes"] for split in SPLITS for entry in manifest["splits"][split]["shards"]}
    for name in (*sizes, *manifest["files"]):
        try:
            size = (folder / name).stat().st_size
            changed = size != sizes[name] if name in sizes else hash_file(folder / name) != manifest["files"][name]
        except OSError as error:
            found[name] = f"is missing ({error.strerror})"
            continue
        if changed:
            found[name] = "is not the file that was written"
    return found


def note_damage(folder: Path, names: list[str]) -> None:
    """Note files that verification found damaged, for preprocessing to make them again."""
    write_json(folder / _NOTE, {"damaged": sorted(names)})


def is_damage_noted(folder: Path) -> bool:
    """Whether verification found damage that has not been mended."""
    return (folder / _NOTE).exists()


def forget_damage(folder: Path) -> None:
    """All has been compared with its checksum and made again where needed."""
    remove(folder / _NOTE)


def is_manifest(manifest: dict[str, Any]) -> bool:
    """Whether all that later stages rely on is there, with the right types."""
    try:
        return (
            manifest["schema"] == SCHEMA
            and manifest["label_order"] == LABEL_ORDER
            and manifest["resize"] == RULE
            and all(isinstance(manifest[key], str) for key in ("plan", "source", "settings", "filter"))
            and isinstance(manifest.get("made_with", {}).get("preprocess", {}), dict)
            and type(manifest["classes"]) is int
            and type(manifest["size"]) is int
            and all(isinstance(digest, str) and "/" not in name for name, digest in manifest["files"].items())
            and sorted(manifest["splits"]) == sorted(SPLITS)
            and all(_is_part(manifest["splits"][split], split) for split in SPLITS)
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _is_part(part: dict[str, Any], split: str) -> bool:
    """Whether this is a manifest's entry of a split."""
    return (
        all(
            _SHARD_NAME.fullmatch(entry["file"]) is not None
            and entry["file"].startswith(split)
            and isinstance(entry["sha256"], str)
            and isinstance(entry["index"], str)
            and type(entry["images"]) is int
            and type(entry["bytes"]) is int
            for entry in part["shards"]
        )
        and part["images"] == sum(entry["images"] for entry in part["shards"]) > 0
    )
