"""Preprocessing: pictures in archives or folders become shuffled HDF5 shards with their colour statistics.

The split's pictures are listed, shuffled once, and cut into slices of ``preprocess.shard_images``; each slice becomes
a shard in one of ``jobs`` worker processes. What a shard holds depends on the plan alone (source, settings, decoder),
so neither the number of jobs nor the order they finish in changes a byte. A shard is put in place when it is complete
and noted in metrics.jsonl with its hash; a run that is started again keeps every shard whose hash is the noted one.
The manifest is written last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing.resource_tracker
import os
import shlex
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import joblib
import numpy as np
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.backend import resource_tracker
from joblib.externals.loky.process_executor import TerminatedWorkerError

from data import demo, published
from data.cluster import on_cluster
from data.convert import ShardResult, ShardTask, make_shard
from data.dataset import read_classes
from data.listing import SPLITS
from data.manifest import defects, forget_damage, is_damage_noted, sound_manifest
from data.origin import made_from
from data.plan import Plan, make_plan, settings, settings_fingerprint, shard_tasks
from data.shards import read_layout, shard_bytes, shard_name
from data.sources import Source, read_source, stamp
from data.tally import Tally
from pipeline.config import Config
from pipeline.config_values import difference, with_values
from pipeline.errors import PipelineError, StoppedError
from pipeline.metrics import MetricsLog, read_metrics
from pipeline.progress import Megabytes, Progress, megabytes, volume
from pipeline.run_dir import RunDir, make_folder, put_in_place
from pipeline.signals import StopRequest

_WORDS: Final = {"train": "training", "val": "validation"}


def run(config: Config, run_dir: RunDir, *, source: Path | None, jobs: int, scheduler: str | None = None) -> int | None:
    """Fill ``<run>/preprocess``, or say that there is nothing to do.

    Returns the signal that came when nothing was left to stop, None for none.

    Parameters
    ----------
    source : Path or None
        Folder with pictures in a form that ``data/sources.py`` knows; None draws the demo set into ``<run>/demo``.
    jobs : int
        Worker processes; 1 works in this process.
    scheduler : str or None
        Address of a Dask scheduler whose workers make the shards instead.

    Raises
    ------
    PipelineError
        The source or the settings differ from those of the shards that are there; the source is incomplete or damaged;
        a class has no readable picture; the disk is too small.
    StoppedError
        SIGINT or SIGTERM came; finished shards are kept.
    """
    if scheduler:  # the workers' current folder is another one
        run_dir, source = RunDir(run_dir.root.absolute()), None if source is None else source.absolute()
    folder = make_folder(run_dir.preprocess)
    if _finished(config, folder, source):
        print(f"preprocess: nothing to do, {folder} is complete")
        return None
    root = source if source is not None else _draw_demo(run_dir)
    start = time.perf_counter()
    listed = read_source(root)
    for note in (*listed.notes, *published.shortfalls(listed), *_unmeasured(listed)):
        print(f"preprocess: note: {note}")
    if len(listed.classes) == 1:
        print(
            f"preprocess: note: {root} has one class only, {listed.classes[0].wnid}: there is nothing to tell apart; "
            "pictures of several classes lie in train/<class>/ and val/<class>/"
        )
    plan = make_plan(config, listed)
    tasks = shard_tasks(plan, folder, None if scheduler else os.getpid())
    _check_place(plan, folder, tasks)
    _require_same_classes(folder, listed)
    tally = Tally(plan)
    with StopRequest() as stop, MetricsLog(folder / "metrics.jsonl") as log:
        with Progress("preprocess", sum(len(task.pictures) for task in tasks), "images") as progress:
            for result in _results(tasks, jobs, folder, stop, scheduler):
                if result.temporary is not None:
                    # Waiting for the disk here, not in the workers, lets them decode on.
                    put_in_place(result.temporary, folder / result.file)
                tally.add(result)
                log.write(tally.record(result, time.perf_counter() - start))
                log.sync()
                progress.advance(len(result.content.labels) + len(result.content.rejects))
        manifest = tally.write(folder)
        forget_damage(folder)
        log.write(_last_record(tally, {"scheduler": scheduler} if scheduler else {"jobs": jobs}, root, folder, start))
    _summary(tally, manifest, folder, time.perf_counter() - start)
    return stop.signum


def _unmeasured(listed: Source) -> list[str]:
    """A sentence on the classes that are trained and have no validation picture, if there are any."""
    shown = {split: set(np.unique(listing.label).tolist()) for split, listing in listed.splits.items()}
    lacking = sorted(shown["train"] - shown["val"])
    if not lacking:
        return []
    what = "has no validation picture" if len(lacking) == 1 else "have no validation pictures"
    example = listed.classes[lacking[0]].wnid
    return [
        f"{len(lacking)} of the {len(shown['train'])} classes with training pictures {what}, such as {example}: "
        f"{'its' if len(lacking) == 1 else 'their'} accuracy is never measured"
    ]


def check_archives(source: Path | None) -> None:
    """Compare the official archives with their published MD5 sums.

    Raises
    ------
    PipelineError
        One is not the published file, or there are none.
    """
    paths = [] if source is None else published.archives_in(source)
    if not paths:
        raise PipelineError(
            f"--check-archives compares the official ILSVRC-2012 archives, but {source or 'the demo set'} holds none; "
            "leave it out, or name their folder with --source"
        )
    total = sum(path.stat().st_size for path in paths)
    with Progress("check", megabytes(total), "MB") as progress:
        counter = Megabytes(progress)
        for path in paths:
            published.check(path, counter.add)
    print(f"preprocess: {', '.join(path.name for path in paths)} are the published archives, by their MD5 sums")


def _finished(config: Config, folder: Path, source: Path | None) -> bool:
    """Whether the manifest is there, matches and describes what is there; refuses where it does not match."""
    path = folder / "manifest.json"
    if not path.exists():
        return False
    manifest = sound_manifest(folder)
    if manifest is None:
        print(f"preprocess: {path} is damaged; making it again")
        return False
    if manifest["settings"] != settings_fingerprint(config):
        before = with_values(config, manifest.get("made_with", {}), str(path))
        differing = "; ".join(difference(before, config)) or "preprocess.* or seed"
        raise _other_plan(folder, f"with other settings than asked for: {differing}")
    same = source is None or _same_stamp(folder, source) or read_source(source).fingerprint() == manifest["source"]
    if not same:
        raise _other_plan(folder, f"from other pictures than {source} holds")
    wrong, noted = defects(folder, manifest), is_damage_noted(folder)
    if wrong:
        print(f"preprocess: making again what is missing or damaged in {folder}: {', '.join(wrong)}")
    if noted:
        print(f"preprocess: verification found damage in {folder}; comparing every shard with its checksum")
    return not wrong and not noted


def _same_stamp(folder: Path, source: Path) -> bool:
    last = [record for record in read_metrics(folder / "metrics.jsonl") if "stamp" in record]
    return bool(last) and last[-1]["stamp"] == stamp(source, _rejected(folder))


def _rejected(folder: Path) -> list[str]:
    """The rejects as ``<split>/<name>``. They are what somebody mends, so whether they changed is asked each time."""
    return [f"{record.get('split')}/{record.get('name')}" for record in read_metrics(folder / "rejects.jsonl")]


def _draw_demo(run: RunDir) -> Path:
    """The demo set's folder; refuses where it would take the place of pictures of the user's own."""
    folder = run.root / "demo"
    source = made_from(run)
    if source is not None:
        raise PipelineError(
            f"{run.preprocess} was made from {source}, but no pictures are named: add --source {shlex.quote(source)}, "
            "or start a new run with --run"
        )
    if not folder.exists():
        print(f"preprocess: no pictures were named, so the built-in demo set is drawn into {folder}")
        demo.draw(folder)
    return folder


def _check_place(plan: Plan, folder: Path, tasks: list[ShardTask]) -> None:
    """Refuse a folder with another plan's shards or a disk that is too small; clear what a crash left over."""
    needed = 0
    for task in tasks:
        path = folder / shard_name(task.layout.split, task.index)
        if not path.is_file():
            needed += shard_bytes(len(task.pictures), task.layout.size)
            continue
        try:
            layout = read_layout(path)
        except PipelineError:
            continue  # damaged: it is made again in its place
        if layout.plan != plan.fingerprint:
            raise _other_plan(folder, "from other pictures, with other settings or with another version of the decoder")
    _remove_stray(folder)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise PipelineError(
            f"the disk of {folder} has {volume(free)} free, but the shards need {volume(needed)}; "
            "free some space or choose another place with --run"
        )
    if needed:
        print(f"preprocess: the shards need {volume(needed)} in {folder}; {volume(free)} are free")


def _require_same_classes(folder: Path, listed: Source) -> None:
    """Refuse to mend shards where other files say what the classes are: it would make the rest another's, unnoticed."""
    manifest, name = sound_manifest(folder), "classes.json"
    if manifest is None or name in defects(folder, manifest):
        return  # nothing sound to compare with
    before = read_classes(folder / name, None, "")
    if before != [dataclasses.asdict(entry) for entry in listed.classes]:
        raise PipelineError(
            f"{listed.root} gives the classes other words or devkit IDs than {folder / name} has, and what is mended "
            "would not fit the rest: put the devkit (or Kaggle's list) there as it was, take it away where there was "
            f"none, or remove {folder} to make all anew"
        )


def _other_plan(folder: Path, how: str) -> PipelineError:
    return PipelineError(
        f"{folder} holds shards made {how}; give this run a directory of its own with --run, "
        f"or remove {folder} to make them anew"
    )


def _remove_stray(folder: Path) -> None:
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


def _results(
    tasks: list[ShardTask], jobs: int, folder: Path, stop: StopRequest, scheduler: str | None
) -> Iterator[ShardResult]:
    """Finished shards as they come. Whatever happens, no worker and no temporary file is left behind.

    After a signal no shard is begun, and those under way are finished.
    """
    if scheduler:
        jobs, results = 1, on_cluster(tasks, scheduler, stop)
    else:
        jobs = min(jobs, max(1, len(tasks)))
        begun = (joblib.delayed(make_shard)(task) for task in tasks if stop.signum is None)
        with _workers_spared() if jobs > 1 else contextlib.nullcontext():
            results = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1, pre_dispatch=jobs)(
                begun
            )
    done = 0
    try:
        for result in results:
            yield result
            done += 1
    except TerminatedWorkerError as error:
        if stop.signum is None:  # else the signal was for the workers as well
            raise PipelineError(
                "a worker process was killed, most likely because memory ran out; run the same command with fewer "
                f"--jobs; the finished shards in {folder} are kept"
            ) from error
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joblib warns where not all results were wanted
            results.close()
        if jobs > 1:
            get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=done < len(tasks))
        _remove_stray(folder)
    if stop.signum is not None and done < len(tasks):
        raise StoppedError(
            stop.signum, f"stopped; the finished shards in {folder} are kept, the same command goes on from there"
        )


@contextlib.contextmanager
def _workers_spared() -> Iterator[None]:
    """Processes begun here do not get SIGINT: it is blocked, and a process has that from the one that began it.

    Ctrl-C on a terminal reaches the workers too. While they still import, nothing of ours could ignore it there.
    """
    for tracker in (multiprocessing.resource_tracker, resource_tracker):
        tracker.ensure_running()  # else they begin with the first worker, and older ones leave SIGINT unblocked
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _last_record(tally: Tally, by: dict[str, Any], root: Path, folder: Path, start: float) -> dict[str, Any]:
    seconds = time.perf_counter() - start
    return {
        "finished": tally.plan.fingerprint,
        "made_with": settings(tally.plan.config),
        "source": str(root),
        "stamp": stamp(root, _rejected(folder)),
        **by,
        "images_done": tally.images,
        "images_made": tally.made,
        "seconds": round(seconds, 3),
        "images_per_second": round(tally.made / seconds, 2),
        "peak_memory_bytes": tally.peak_memory,
        "time": round(time.time(), 3),
    }


def _summary(tally: Tally, manifest: dict[str, Any], folder: Path, seconds: float) -> None:
    counts = " and ".join(f"{manifest['splits'][split]['images']} {_WORDS[split]}" for split in SPLITS)
    rejects = sum(manifest["splits"][split]["rejects"] for split in SPLITS)
    size = volume(sum(entry["bytes"] for entry in tally.entries.values()))
    kept = f", {tally.kept} of them from before" if tally.kept else ""
    where = f", see {folder / 'rejects.jsonl'}" if rejects else ""
    print(
        f"preprocess: {counts} pictures of {manifest['classes']} classes are in {folder}: "
        f"{len(tally.entries)} shards{kept}, {size}\n"
        f"preprocess: {rejects} rejected{where}; "
        f"{tally.made / seconds:.0f} images/s, {seconds:.1f} s, peak memory {volume(tally.peak_memory)} a process"
    )
    if tally.turned and not tally.plan.config.preprocess.upright:
        print(
            f"preprocess: note: EXIF orientation (in {tally.turned} of {tally.made} pictures) is ignored, as by "
            "ImageNet's baselines; --set preprocess.upright=true in a new run (--run) turns photographs of your own"
        )
    for kind, count in manifest["decoder_warnings"].items():
        print(f"preprocess: the decoder warned {count} times: {kind}")
