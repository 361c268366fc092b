"""What preprocessing will make: which picture goes into which shard, and fingerprints of all that decides the bytes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.convert import ShardTask
from data.images import decoder
from data.listing import SPLITS, shuffled
from data.manifest import sound_manifest
from data.shards import LABEL_ORDER, RULE, SCHEMA, Layout, shard_name
from data.sources import Source
from pipeline.config import Config
from pipeline.metrics import read_metrics
from pipeline.run_dir import fingerprint


@dataclass(frozen=True)
class Plan:
    """A source, the configuration and the decoder it is preprocessed with, and a fingerprint of everything together."""

    source: Source
    source_fingerprint: str
    config: Config
    decoder: dict[str, str]
    fingerprint: str


def make_plan(config: Config, source: Source) -> Plan:
    """The plan for a source and a configuration.

    Raises
    ------
    PipelineError
        The decoder asked for is not installed.
    """
    pictures, decoded_by = source.fingerprint(), decoder(config.preprocess.decoder)
    whole = fingerprint([SCHEMA, RULE, LABEL_ORDER, pictures, settings_fingerprint(config), decoded_by])
    return Plan(source, pictures, config, decoded_by, whole)


def settings(config: Config) -> dict[str, Any]:
    """The settings that decide what the shards hold, nested as in config.json."""
    return {"seed": config.seed, "preprocess": dataclasses.asdict(config.preprocess)}


def settings_fingerprint(config: Config) -> str:
    """A hash of these settings."""
    how = dataclasses.asdict(config.preprocess)
    if not how["upright"]:
        del how["upright"]  # shards made before there was this choice are the same
    return fingerprint([how, config.seed])


def shard_tasks(plan: Plan, folder: Path, parent: int | None) -> list[ShardTask]:
    """The splits, each shuffled once as a whole, cut into slices of ``shard_images``; ``parent`` as in ShardTask."""
    known, how = _known_hashes(plan, folder), plan.config.preprocess
    ids = np.array([-1 if c.devkit_id is None else c.devkit_id for c in plan.source.classes], dtype=np.int32)
    tasks = []
    for split in SPLITS:
        listing = plan.source.splits[split]
        order = shuffled(len(listing), plan.config.seed, split)
        layout = Layout(split, plan.fingerprint, how.size, how.filter)
        for index, first in enumerate(range(0, len(order), how.shard_images)):
            pictures = listing.take(order[first : first + how.shard_images])
            hashed = known.get(shard_name(split, index))
            tasks.append(ShardTask(folder, layout, index, pictures, ids, hashed, plan.decoder, how.upright, parent))
    return tasks


def _known_hashes(plan: Plan, folder: Path) -> dict[str, str]:
    """The hash of each shard that was finished under this plan, as metrics.jsonl and the manifest have it."""
    known = {
        record["shard"]: record["sha256"]
        for record in read_metrics(folder / "metrics.jsonl")
        if record.get("plan") == plan.fingerprint
        and isinstance(record.get("shard"), str)
        and isinstance(record.get("sha256"), str)
    }
    manifest = sound_manifest(folder)
    if manifest is not None and manifest["plan"] == plan.fingerprint:
        for split in SPLITS:
            known |= {entry["file"]: entry["sha256"] for entry in manifest["splits"][split]["shards"]}
    return known
