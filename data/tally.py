"""What preprocessing made: counts and colour sums over all shards, and the files that describe them."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from data.color import mean_picture, statistics
from data.convert import ShardResult
from data.images import FORMATS
from data.listing import SPLITS, Reject
from data.plan import Plan, settings, settings_fingerprint
from data.shards import LABEL_ORDER, RULE, SCHEMA, index_hash
from pipeline.errors import PipelineError
from pipeline.run_dir import hash_file, write_bytes, write_json, write_sealed

_READ: Final = f"what is read are {', '.join(FORMATS)}"
_DESCRIPTIONS: Final = ("color.json", "classes.json", "mean.npy", "rejects.jsonl")


@dataclass
class Tally:
    """Adds up shards as they are finished, in any order; integers only, so the order does not matter.

    A shard leaves a few numbers behind, not its arrays: the full set has 1,301 shards.
    """

    plan: Plan
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)  # as in the manifest, by file name
    rejects: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    warnings: Counter[str] = field(default_factory=Counter)
    images: int = 0
    made: int = 0  # images decoded now, not kept from before
    kept: int = 0  # shards kept from before
    turned: int = 0  # pictures decoded now whose EXIF data say that they are to be turned
    peak_memory: int = 0
    _moments: np.ndarray = field(default_factory=lambda: np.zeros((4, 4), dtype=np.int64))
    _total: np.ndarray = field(init=False)
    _readable: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        size = self.plan.config.preprocess.size
        self._total = np.zeros((size, size, 3), dtype=np.int64)
        self._readable = {split: np.zeros(len(self.plan.source.classes), dtype=np.int64) for split in SPLITS}

    def add(self, result: ShardResult) -> None:
        """Count a finished shard."""
        content, split = result.content, result.split
        count = len(content.labels)
        self.entries[result.file] = {
            "file": result.file,
            "images": count,
            "bytes": result.bytes,
            "sha256": result.sha256,
            "index": index_hash(content.labels, content.crc),
        }
        self.rejects[result.file] = content.rejects
        self.warnings.update(content.warnings)
        self.images += count
        self.made += count if result.temporary is not None else 0
        self.kept += result.temporary is None
        self.turned += result.turned
        self.peak_memory = max(self.peak_memory, result.peak_memory)
        self._readable[split] += np.bincount(content.labels, minlength=len(self.plan.source.classes))
        if split == "train":
            self._moments += content.moments
            self._total += content.total

    def record(self, result: ShardResult, seconds: float) -> dict[str, Any]:
        """The line of metrics.jsonl for a shard that has been added, after ``seconds`` of work.

        The hash in it is what lets a run that was cut off keep the shard.
        """
        return {
            "shard": result.file,
            "plan": self.plan.fingerprint,
            "sha256": result.sha256,
            "images": len(result.content.labels),
            "rejects": len(result.content.rejects),
            "kept": result.temporary is None,
            "seconds": round(result.seconds, 3),
            "images_done": self.images,
            "images_per_second": round(self.made / seconds, 2),
            "time": round(time.time(), 3),
        }

    def write(self, folder: Path) -> dict[str, Any]:
        """Write rejects, colour statistics, mean picture and classes, then the manifest; returns the manifest.

        Raises
        ------
        PipelineError
            A class of the training set, or a whole split, has no readable picture; or a file cannot be written.
        """
        rejects = list(self.plan.source.rejects)
        for file in sorted(self.rejects):
            rejects += [Reject(file.partition("-")[0], *entry) for entry in self.rejects[file]]
        lines = "".join(json.dumps(dataclasses.asdict(reject)) + "\n" for reject in rejects)
        write_bytes(folder / "rejects.jsonl", lines.encode())
        self._refuse_unreadable(folder)
        images = int(self._readable["train"].sum())
        write_json(folder / "color.json", statistics(self._moments, images))
        mean = io.BytesIO()
        np.save(mean, mean_picture(self._total, images))
        write_bytes(folder / "mean.npy", mean.getbuffer())
        classes = [dataclasses.asdict(entry) for entry in self.plan.source.classes]
        write_json(folder / "classes.json", {"classes": classes})
        manifest = self._manifest(folder, rejects)
        write_sealed(folder / "manifest.json", manifest)
        return manifest

    def _manifest(self, folder: Path, rejects: list[Reject]) -> dict[str, Any]:
        # Nothing here changes from run to run: a checkpoint remembers the manifest as the data it belongs to.
        config, splits = self.plan.config, {}
        for split in SPLITS:
            shards = [self.entries[file] for file in sorted(self.entries) if file.startswith(split)]
            splits[split] = {
                "images": sum(entry["images"] for entry in shards),
                "rejects": sum(reject.split == split for reject in rejects),
                "shards": shards,
            }
        return {
            "schema": SCHEMA,
            "plan": self.plan.fingerprint,
            "source": self.plan.source_fingerprint,
            "settings": settings_fingerprint(config),
            "made_with": settings(config),
            "decoder": self.plan.decoder,
            "size": config.preprocess.size,
            "filter": config.preprocess.filter,
            "resize": RULE,
            "label_order": LABEL_ORDER,
            "classes": len(self.plan.source.classes),
            "splits": splits,
            "files": {name: hash_file(folder / name) for name in _DESCRIPTIONS},
            "decoder_warnings": dict(sorted(self.warnings.items())),
        }

    def _refuse_unreadable(self, folder: Path) -> None:
        source = self.plan.source
        rejects = folder / "rejects.jsonl"
        for split in SPLITS:
            if not self._readable[split].any():
                raise PipelineError(
                    f"none of the pictures of {split} in {source.root} can be read, see {rejects}; {_READ}"
                )
        listed = np.bincount(source.splits["train"].label, minlength=len(source.classes))
        lost = np.flatnonzero((listed > 0) & (self._readable["train"] == 0)).tolist()
        if lost:
            names = ", ".join(source.classes[label].wnid for label in lost[:5])
            raise PipelineError(
                f"none of the training pictures of the class {names} can be read, see {rejects}; {_READ}; "
                f"mend or remove that class in {source.root}, then remove {folder} and run the same command again"
            )
