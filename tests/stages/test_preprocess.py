"""Preprocessing as a stage: what it makes, what it keeps, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from joblib.externals.loky import get_reusable_executor
from PIL import Image

from data import convert, demo, ilsvrc, kaggle
from data import plan as plan_module
from data.convert import ShardResult, ShardTask, make_shard
from data.images import read_square, rgbx, square
from data.listing import Rows, shuffled
from data.manifest import read_manifest
from data.plan import make_plan, settings, settings_fingerprint, shard_tasks
from data.sources import read_source
from data.split import Split, open_split
from data.tally import Tally
from pipeline.config import DEMO, Config, Preprocess
from pipeline.errors import PipelineError, StoppedError
from pipeline.metrics import read_metrics
from pipeline.run_dir import RunDir, write_sealed
from stages import preprocess
from tests import pictures
from tests.command_line import QUICK, pipeline
from tests.command_line import settings as asked
from tests.conftest import ROOT
from tests.data.archives import jpeg, packed, small_official
from tests.data.test_sources import content, unpack_train, unpack_val
from tests.pictures import sources

CONFIG = dataclasses.replace(DEMO, preprocess=Preprocess(size=32, shard_images=16))
DESCRIPTIONS = ["classes.json", "color.json", "manifest.json", "mean.npy", "rejects.jsonl"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo set with eight training and two validation pictures a class; its odd files are among them."""
    folder = tmp_path_factory.mktemp("source") / "demo"
    demo.draw(folder, jobs=1, train=8, val=2)
    return folder


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run preprocessed in one go."""
    run = RunDir(tmp_path_factory.mktemp("undisturbed"))
    preprocess.run(CONFIG, run, source=source, jobs=1)
    return run


@pytest.fixture
def copied(undisturbed: RunDir, tmp_path: Path) -> RunDir:
    """A copy of that run, to be damaged."""
    shutil.copytree(undisturbed.root, tmp_path / "copy")
    return RunDir(tmp_path / "copy")


def made(run: RunDir) -> dict[str, bytes]:
    """All files but the log of when what was made."""
    return {p.name: p.read_bytes() for p in run.preprocess.iterdir() if p.name != "metrics.jsonl"}


def splits(run: RunDir) -> tuple[Split, Split]:
    manifest = read_manifest(run)
    return open_split(run.preprocess, manifest, "train"), open_split(run.preprocess, manifest, "val")


def again(run: RunDir, source: Path | None, config: Config = CONFIG, jobs: int = 1) -> None:
    preprocess.run(config, run, source=source, jobs=jobs)


def test_the_files_are_those_of_the_contract(undisturbed: RunDir):
    shards = [f"train-{i:05d}.h5" for i in range(6)] + [f"val-{i:05d}.h5" for i in range(2)]
    assert sorted(p.name for p in undisturbed.preprocess.iterdir()) == sorted([*DESCRIPTIONS, "metrics.jsonl", *shards])


def test_photographs_that_lie_on_their_side_are_turned_where_that_is_asked_for(small_source: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(small_source, source)
    path, exif = source / "train" / "class0" / "train0.png", Image.Exif()
    upright = Image.open(path)
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)

    def stored(name: str, *changes: str) -> tuple[np.ndarray, str]:
        run = tmp_path / name
        said = pipeline(
            "--stage",
            "preprocess",
            "--source",
            source,
            "--run",
            run,
            "--jobs",
            1,
            *asked(*QUICK, *changes),
        ).done()
        train, _ = splits(RunDir(run))
        return train.row(sources(train).tolist().index(b"class0/train0.png")), said.out

    lying, said = stored("lying")
    assert "EXIF orientation (in 1 of 35 pictures) is ignored" in said
    turned, said = stored("turned", "preprocess.upright=true")
    assert "EXIF" not in said
    np.testing.assert_array_equal(turned, square(rgbx(upright.convert("RGB")), 72, "bicubic"))
    np.testing.assert_array_equal(lying, square(rgbx(upright.transpose(Image.Transpose.ROTATE_90)), 72, "bicubic"))
    pipeline(
        "--stage", "preprocess", "--source", source, "--run", tmp_path / "lying", *asked("preprocess.upright=true")
    ).refused("other settings than asked for: preprocess.upright")


def test_shards_made_before_pictures_could_be_turned_are_kept():
    """The hashes of their settings, as they stand in their manifests and in checkpoints."""
    assert settings_fingerprint(DEMO) == "db7d8579ca174c6942c00566cc253cdf0962b9ff98408dd336a7f350ce1ad823"
    turned = dataclasses.replace(DEMO, preprocess=Preprocess(upright=True))
    assert settings_fingerprint(turned) != settings_fingerprint(DEMO)


def test_every_picture_is_in_a_shard_with_its_label_or_rejected_with_its_reason(undisturbed: RunDir, source: Path):
    train, val = splits(undisturbed)
    rejects = [json.loads(line) for line in (undisturbed.preprocess / "rejects.jsonl").read_text().splitlines()]
    assert [(r["split"], r["name"]) for r in rejects] == [("train", "n90000011/n90000011_7.JPEG")]
    assert "truncated" in rejects[0]["reason"]
    assert [part["rejects"] for part in read_manifest(undisturbed)["splits"].values()] == [1, 0]
    expected = {f"{demo.wnid(c)}/{demo.wnid(c)}_{n}.JPEG": c for c in range(12) for n in range(1, 9)}
    del expected["n90000011/n90000011_7.JPEG"]
    found = dict(zip((s.decode() for s in sources(train).tolist()), train.labels.tolist(), strict=True))
    assert found == expected
    truth = ilsvrc.read_devkit(source / ilsvrc.DEVKIT).ground_truth.tolist()
    for name, label in zip(sources(val).tolist(), val.labels.tolist(), strict=True):
        assert demo.devkit_id(label) == truth[int(name[15:23]) - 1]
    assert len(val) == 24
    assert Counter(val.labels.tolist()) == dict.fromkeys(range(12), 2)


def test_the_pixels_are_those_of_the_source(undisturbed: RunDir, source: Path):
    listing = read_source(source).splits["train"]
    row_of = {name: row for row, name in enumerate(listing.name.tolist())}
    train, _ = splits(undisturbed)
    for row, name in enumerate(sources(train).tolist()):
        expected = read_square(content(listing, row_of[name]), 32, "bicubic", Counter())
        np.testing.assert_array_equal(train.row(row), expected)


def test_the_order_is_the_shuffle_of_the_whole_split(undisturbed: RunDir, source: Path):
    listing = read_source(source).splits["train"]
    names = listing.name[shuffled(96, CONFIG.seed, "train")].tolist()
    names.remove(b"n90000011/n90000011_7.JPEG")
    train, _ = splits(undisturbed)
    assert sources(train).tolist() == names
    assert len(set(train.labels[:12].tolist())) > 4  # not class by class


def test_the_plan_is_a_shuffle_of_each_split_by_the_seed(source: Path, tmp_path: Path):
    config = dataclasses.replace(CONFIG, seed=5)
    plan = make_plan(config, read_source(source))
    assert settings(plan.config) == {"seed": 5, "preprocess": dataclasses.asdict(config.preprocess)}
    tasks = shard_tasks(plan, tmp_path, None)
    for split, listing in plan.source.splits.items():
        names = [name for task in tasks if task.layout.split == split for name in task.pictures.name.tolist()]
        assert names == listing.name[shuffled(len(listing), 5, split)].tolist()


def test_the_devkits_ids_are_in_the_shards(undisturbed: RunDir, odd: RunDir):
    def ids(run: RunDir) -> list[tuple[int, int]]:
        """Label and ID of each training picture."""
        found = []
        for path in sorted(run.preprocess.glob("train-*.h5")):
            with h5py.File(path) as file:
                found += zip(file["labels"][()].tolist(), file["devkit_id"][()].tolist(), strict=True)
        return found

    assert ids(undisturbed) == [(label, demo.devkit_id(label)) for label in splits(undisturbed)[0].labels.tolist()]
    assert ids(odd) == [(label, -1) for label in splits(odd)[0].labels.tolist()]


ODD = dataclasses.replace(CONFIG, preprocess=Preprocess(size=32, shard_images=6, filter="box"))


@pytest.fixture(scope="module")
def odd_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes as folders; each has a picture that cannot be read, and two a palette that the decoder warns of."""
    root = pictures.draw(tmp_path_factory.mktemp("odd") / "source", {"train": (4, 4, 4), "val": (1, 1, 1)})
    for label in range(3):
        (root / "train" / f"class{label}" / "train1.png").write_bytes(b"no picture")
    for label in range(2):
        path = root / "train" / f"class{label}" / "train2.png"
        Image.open(path).quantize(16).save(path, transparency=bytes([0, 128]))
    return root


@pytest.fixture(scope="module")
def odd(odd_source: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run preprocessed from these, with another filter."""
    run = RunDir(tmp_path_factory.mktemp("odd_run"))
    again(run, odd_source, ODD)
    return run


def test_the_filter_is_that_of_the_settings(odd: RunDir, odd_source: Path):
    train, _ = splits(odd)
    for row, name in enumerate(sources(train).tolist()):
        data = (odd_source / "train" / name.decode()).read_bytes()
        np.testing.assert_array_equal(train.row(row), read_square(data, 32, "box", Counter()))


def test_rejects_are_in_the_order_of_the_shards_and_warnings_are_added_up(odd: RunDir, odd_source: Path):
    listing = read_source(odd_source).splits["train"]
    order = [name.decode() for name in listing.name[shuffled(len(listing), ODD.seed, "train")].tolist()]
    rejects = [json.loads(line)["name"] for line in (odd.preprocess / "rejects.jsonl").read_text().splitlines()]
    assert rejects == [name for name in order if name.endswith("train1.png")]
    assert list(read_manifest(odd)["decoder_warnings"].values()) == [2]


def test_the_order_in_which_shards_are_finished_changes_nothing(
    odd: RunDir, odd_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    memory = itertools.count(9, -1)

    def with_less_and_less(task: ShardTask) -> ShardResult:
        return dataclasses.replace(make_shard(task), peak_memory=next(memory))

    monkeypatch.setattr(preprocess, "make_shard", with_less_and_less)
    monkeypatch.setattr(preprocess, "shard_tasks", lambda *given: shard_tasks(*given)[::-1])
    run = RunDir(tmp_path)
    again(run, odd_source, ODD)
    assert made(run) == made(odd)
    assert read_metrics(run.preprocess / "metrics.jsonl")[-1]["peak_memory_bytes"] == 9  # the largest


def test_a_worker_names_its_file_after_itself_and_sends_no_pictures_back(odd_source: Path, tmp_path: Path):
    task = shard_tasks(make_plan(ODD, read_source(odd_source)), tmp_path, None)[0]
    result = make_shard(task)
    assert result.temporary == tmp_path / f"train-00000.h5.{socket.gethostname()}-{os.getpid()}.tmp"
    assert result.content.images is None


def test_a_worker_that_decodes_in_another_way_is_refused(odd_source: Path, tmp_path: Path):
    task = shard_tasks(make_plan(ODD, read_source(odd_source)), tmp_path, None)[0]
    with pytest.raises(
        PipelineError, match=r"decodes pictures with Pillow .* but this run is made with Pillow 1\.2\.3"
    ):
        make_shard(dataclasses.replace(task, decoder={**task.decoder, "version": "1.2.3"}))
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_read_in_the_order_they_lie_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows, opened, real = Rows("train"), [], os.open
    for name in ("b.tar", "a.tar"):
        rows.containers.append(tmp_path / name)
        (tmp_path / name).write_bytes(bytes(range(9)))
        for offset in (4, 8, 0, 6):
            rows.add(f"{name}/{9 - offset}".encode(), 0, 1, offset)
    monkeypatch.setattr(os, "open", lambda path, *how: opened.append(path) or real(path, *how))
    read = [data[0] for _, data in convert.read_files(rows.listing())]
    assert read == [0, 4, 6, 8] * 2
    assert opened == [tmp_path / "b.tar", tmp_path / "a.tar"]


def test_shards_are_on_the_disk_before_the_manifest_names_them(
    odd_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced, fsync, write = set(), os.fsync, Tally.write
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino) or fsync(handle))

    def checked(tally: Tally, folder: Path) -> dict[str, Any]:
        assert synced >= {path.stat().st_ino for path in (*folder.glob("*.h5"), folder, folder / "metrics.jsonl")}
        return write(tally, folder)

    monkeypatch.setattr(Tally, "write", checked)
    again(RunDir(tmp_path), odd_source, ODD)


def test_progress_counts_rejected_pictures_too(odd_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    again(RunDir(tmp_path), odd_source, ODD)
    assert "preprocess: 15/15 images" in capsys.readouterr().err


def test_a_manifest_of_another_version_is_made_again(copied: RunDir, undisturbed: RunDir, source: Path):
    write_sealed(copied.preprocess / "manifest.json", {"schema": 0})
    again(copied, source)
    assert made(copied) == made(undisturbed)


def test_no_archive_stays_open(tmp_path: Path):
    for split in ("train", "val"):
        (tmp_path / "source" / split).mkdir(parents=True)
        for wnid in ("n01", "n02"):
            (tmp_path / "source" / split / f"{wnid}.tar").write_bytes(packed({"a.JPEG": jpeg(1), "b.JPEG": jpeg(2)}))
    again(RunDir(tmp_path / "first"), tmp_path / "source")  # what is loaded once is open from here on
    before = len(os.listdir("/dev/fd"))
    again(RunDir(tmp_path / "second"), tmp_path / "source")
    assert len(os.listdir("/dev/fd")) == before


def test_colour_statistics_and_mean_picture_are_those_of_the_training_pictures(undisturbed: RunDir):
    train, _ = splits(undisturbed)
    pictures = np.concatenate(train.images)
    color = json.loads((undisturbed.preprocess / "color.json").read_text())
    pixels = pictures.reshape(-1, 3) / 255
    assert color["count"] == 95
    np.testing.assert_allclose(color["mean"], pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(color["covariance"], np.cov(pixels.T, bias=True), rtol=1e-9)
    mean = np.load(undisturbed.preprocess / "mean.npy", allow_pickle=False)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, pictures.mean(axis=0), rtol=1e-5)


def test_shards_are_not_mended_with_other_devkit_ids(tmp_path: Path):
    official, source, run = small_official(tmp_path / "official"), tmp_path / "source", tmp_path / "run"
    unpack_train(official, source, as_tars=False)
    shutil.copytree(source / "train", source / "val")
    devkit = source / ilsvrc.DEVKIT
    shutil.copyfile(official / ilsvrc.DEVKIT, devkit)
    command = ("--stage", "preprocess", "--source", source, "--run", run, "--jobs", 1)
    pipeline(*command, *asked(*QUICK)).done()
    whole = made(RunDir(run))
    (run / "preprocess" / "val-00000.h5").unlink()
    devkit.rename(tmp_path / "devkit")
    pipeline(*command).refused(f"{source} gives the classes other words or devkit IDs than .*classes.json has")
    (tmp_path / "devkit").rename(devkit)
    pipeline(*command).done()
    assert made(RunDir(run)) == whole
    devkit.unlink()  # nothing is to be made
    assert "nothing to do" in pipeline(*command).done().out


def test_a_devkit_that_came_between_two_starts_is_in_all_shards(tmp_path: Path):
    official, source = small_official(tmp_path / "official"), tmp_path / "source"
    unpack_train(official, source, as_tars=False)
    shutil.copytree(source / "train", source / "val")
    whole, begun = tmp_path / "whole", tmp_path / "begun"

    def preprocess(run: Path) -> None:
        pipeline("--stage", "preprocess", "--source", source, "--run", run, "--jobs", 1, *asked(*QUICK)).done()

    preprocess(begun)
    (begun / "preprocess" / "manifest.json").unlink()  # as where it was killed before the end
    shutil.copyfile(official / ilsvrc.DEVKIT, source / ilsvrc.DEVKIT)
    preprocess(begun)
    preprocess(whole)
    assert made(RunDir(begun)) == made(RunDir(whole))


def test_the_classes_have_wnid_words_and_devkit_id(undisturbed: RunDir):
    classes = json.loads((undisturbed.preprocess / "classes.json").read_text())["classes"]
    assert classes == [
        {"wnid": demo.wnid(c), "words": demo.KINDS[c].words, "devkit_id": demo.devkit_id(c)} for c in range(12)
    ]


def test_the_bytes_do_not_depend_on_the_number_of_jobs(undisturbed: RunDir, source: Path, tmp_path: Path):
    run = RunDir(tmp_path)
    again(run, source, jobs=2)
    assert made(run) == made(undisturbed)


def test_progress_and_memory_are_logged(undisturbed: RunDir):
    records = read_metrics(undisturbed.preprocess / "metrics.jsonl")
    assert [r["images_done"] for r in records] == [*np.cumsum([r["images"] for r in records[:-1]]).tolist(), 119]
    assert 10e6 < records[-1]["peak_memory_bytes"] < 10e9
    assert records[-1]["images_per_second"] > 0


def test_a_second_run_finds_nothing_to_do(copied: RunDir, source: Path, capsys):
    before = {p: p.stat().st_mtime_ns for p in copied.preprocess.iterdir()}
    again(copied, source)
    again(copied, None)  # the run knows what it was made from
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert {p: p.stat().st_mtime_ns for p in copied.preprocess.iterdir()} == before


def test_a_source_that_moved_is_the_same_source(copied: RunDir, source: Path, tmp_path: Path, capsys):
    moved = shutil.copytree(source, tmp_path / "moved", copy_function=shutil.copyfile)  # with new times
    again(copied, moved)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, seed=1),
        dataclasses.replace(CONFIG, preprocess=Preprocess(size=32, shard_images=17)),
        dataclasses.replace(CONFIG, preprocess=Preprocess(size=16, shard_images=16)),
        dataclasses.replace(CONFIG, preprocess=Preprocess(size=32, shard_images=16, filter="box")),
    ],
)
def test_other_settings_are_refused_with_both_ways_on(copied: RunDir, source: Path, config, complete):
    if not complete:
        (copied.preprocess / "manifest.json").unlink()
    before = made(copied)
    with pytest.raises(PipelineError, match=r"with other settings.*with --run, or remove .*preprocess"):
        again(copied, source, config)
    assert made(copied) == before


@pytest.mark.parametrize("complete", [True, False])
def test_another_source_is_refused_with_both_ways_on(copied: RunDir, tmp_path: Path, complete):
    if not complete:
        (copied.preprocess / "manifest.json").unlink()
    before = made(copied)
    with pytest.raises(PipelineError, match=r"from other pictures.*with --run, or remove .*preprocess"):
        again(copied, small_official(tmp_path / "other"))
    assert made(copied) == before


def test_another_decoder_is_refused(copied: RunDir, source: Path, monkeypatch: pytest.MonkeyPatch):
    (copied.preprocess / "manifest.json").unlink()
    before, decoder = made(copied), plan_module.decoder
    monkeypatch.setattr(plan_module, "decoder", lambda name: {**decoder(name), "version": "1.2.3"})
    with pytest.raises(PipelineError, match="or with another version of the decoder"):
        again(copied, source)
    assert made(copied) == before


@pytest.mark.parametrize("lost", ["train-00001.h5", "val-00000.h5", *DESCRIPTIONS])
@pytest.mark.parametrize("how", ["missing", "cut", "changed"])
def test_what_is_lost_is_made_again_and_nothing_else(
    copied: RunDir, undisturbed: RunDir, source: Path, lost: str, how: str
):
    path = copied.preprocess / lost
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
        if lost.endswith(".h5"):  # of a shard only the size is looked at each time; so the manifest is lost as well
            (copied.preprocess / "manifest.json").unlink()
    shards = [p for p in copied.preprocess.glob("*.h5") if p.name != lost]
    before = {p: p.stat().st_ino for p in shards}
    again(copied, source)
    assert made(copied) == made(undisturbed)
    assert {p: p.stat().st_ino for p in shards} == before


def test_without_the_log_the_manifest_tells_which_shards_are_sound(copied: RunDir, undisturbed: RunDir, source: Path):
    for name in ("metrics.jsonl", "train-00001.h5"):
        (copied.preprocess / name).unlink()
    before = {path: path.stat().st_ino for path in copied.preprocess.glob("*.h5")}
    again(copied, source)
    assert made(copied) == made(undisturbed)
    assert {path: path.stat().st_ino for path in before} == before


def test_mending_without_the_source_is_refused(copied: RunDir, tmp_path: Path):
    (copied.preprocess / "train-00001.h5").unlink()
    (copied.root / "demo").mkdir()
    small_official(copied.root / "demo")
    before = made(copied)
    with pytest.raises(PipelineError, match=r"was made from .*: add --source"):
        again(copied, None)
    assert made(copied) == before


def interrupted(run: RunDir, source: Path, trouble: str, jobs: int) -> subprocess.Popen[str]:
    """Preprocess in a process of its own with ``trouble`` patched in."""
    code = f"""
import os, signal
from pathlib import Path
from data import convert, shards
from pipeline.run_dir import RunDir, put_in_place
from stages import preprocess
from tests.stages.test_preprocess import CONFIG
done = 0
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
def put_then_die(temporary, path):
    global done
    put_in_place(temporary, path)
    done += 1
    if done == 3:
        die()
def die_in_the_middle(path, *arguments):
    path.write_bytes(bytes(1000))
    die()
{trouble}
preprocess.run(CONFIG, RunDir(Path({str(run.root)!r})), source=Path({str(source)!r}), jobs={jobs})
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("trouble", "jobs", "kept"),
    [
        ("preprocess.put_in_place = put_then_die", 1, 2),  # a shard is in place, but not yet noted
        ("preprocess.put_in_place = put_then_die", 2, 2),
        ("convert.write_shard = die_in_the_middle", 1, 0),
        ("preprocess.Tally.write = die", 1, 8),
    ],
)
def test_after_kill_9_the_run_ends_as_if_nothing_had_happened(
    source: Path, undisturbed: RunDir, tmp_path: Path, capsys, trouble, jobs, kept
):
    run = RunDir(tmp_path)
    process = interrupted(run, source, trouble, jobs)
    process.communicate(timeout=100)  # ends when nobody holds its standard error any more: no worker outlives it
    assert process.returncode == -signal.SIGKILL
    assert not (run.preprocess / "manifest.json").exists()
    again(run, source)
    assert made(run) == made(undisturbed)  # and no temporary file is left
    assert sum(r.get("kept") is True for r in read_metrics(run.preprocess / "metrics.jsonl")) == kept


@pytest.mark.parametrize(("signum", "jobs"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_a_signal_stops_between_shards_and_the_next_run_goes_on(
    source: Path, tmp_path: Path, monkeypatch, signum, jobs
):
    run, whole, put = RunDir(tmp_path / "stopped"), RunDir(tmp_path / "whole"), preprocess.put_in_place
    config = dataclasses.replace(CONFIG, preprocess=Preprocess(size=32, shard_images=2))  # 60 shards

    def put_and_signal(temporary: Path, path: Path) -> None:
        put(temporary, path)
        if len(list(run.preprocess.glob("*.h5"))) == 3:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(preprocess, "put_in_place", put_and_signal)
    with pytest.raises(StoppedError, match="the same command goes on from there") as caught:
        again(run, source, config, jobs=jobs)
    assert caught.value.signum == signum
    assert 3 <= len(list(run.preprocess.glob("*.h5"))) < 60  # those under way are finished
    assert list(run.preprocess.glob("*.tmp")) == []
    monkeypatch.undo()
    again(run, source, config)
    again(whole, source, config)
    assert made(run) == made(whole)


def test_a_killed_worker_is_told_and_the_finished_shards_are_kept(source: Path, tmp_path: Path, monkeypatch):
    run = RunDir(tmp_path)
    put = preprocess.put_in_place

    def put_and_kill(temporary: Path, path: Path) -> None:
        put(temporary, path)
        for pid in list(get_reusable_executor(reuse=True)._processes):
            os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(preprocess, "put_in_place", put_and_kill)
    config = dataclasses.replace(CONFIG, preprocess=Preprocess(size=32, shard_images=2))
    with pytest.raises(PipelineError, match="a worker process was killed, most likely because memory ran out"):
        again(run, source, config, jobs=2)
    assert list(run.preprocess.glob("*.h5"))
    assert list(run.preprocess.glob("*.tmp")) == []


def test_a_damaged_shard_of_an_unfinished_run_is_made_again(
    copied: RunDir, undisturbed: RunDir, source: Path, capsys: pytest.CaptureFixture[str]
):
    (copied.preprocess / "manifest.json").unlink()
    path = copied.preprocess / "train-00003.h5"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (copied.preprocess / "train-00002.h5").write_bytes(b"no HDF5 at all")
    again(copied, source)
    assert made(copied) == made(undisturbed)
    assert "8 shards, 6 of them from before" in capsys.readouterr().out
    records = read_metrics(copied.preprocess / "metrics.jsonl")
    renewed = [r["images"] for r in records[-9:-1] if r["shard"] in ("train-00002.h5", "train-00003.h5")]
    assert (len(renewed), sum(renewed)) == (2, records[-1]["images_made"])


def test_a_class_without_a_readable_picture_is_told_and_the_shards_stay(tmp_path: Path):
    source, run = small_official(tmp_path / "source"), RunDir(tmp_path / "run")
    files = {w: packed({f"{w}_{i}.JPEG": jpeg(i) for i in range(3)}) for w in ("n01", "n03")}
    broken = packed({f"n02_{i}.JPEG": b"no picture" for i in range(3)})
    (source / ilsvrc.TRAIN).write_bytes(packed({f"{w}.tar": d for w, d in {**files, "n02": broken}.items()}))
    for _ in range(2):
        with pytest.raises(
            PipelineError, match=r"none of the training pictures of the class n02 can be read, see .*rej"
        ):
            again(run, source)
        rejects = (run.preprocess / "rejects.jsonl").read_text().splitlines()
        assert len(rejects) == 3
        assert json.loads(rejects[0])["reason"] == "not a picture in a known format"
        assert not (run.preprocess / "manifest.json").exists()
    assert [r["kept"] for r in read_metrics(run.preprocess / "metrics.jsonl")] == [False, False, True, True]


def test_a_split_without_a_readable_picture_is_told(tmp_path: Path):
    source = small_official(tmp_path / "source")
    (source / ilsvrc.VAL).write_bytes(packed({"ILSVRC2012_val_00000001.JPEG": b"no picture"}))
    with pytest.raises(PipelineError, match=r"none of the pictures of val in .* can be read"):
        again(RunDir(tmp_path / "run"), source)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_archive_that_shrinks_while_it_is_read_is_told(tmp_path: Path, monkeypatch, jobs):
    source, run = small_official(tmp_path / "source"), RunDir(tmp_path / "run")
    check = preprocess._check_place

    def cut(*arguments: object) -> None:
        check(*arguments)
        os.truncate(source / ilsvrc.TRAIN, 2000)

    monkeypatch.setattr(preprocess, "_check_place", cut)
    with pytest.raises(PipelineError, match=rf"{ilsvrc.TRAIN} is shorter than when it was listed"):
        again(run, source, jobs=jobs)
    assert list(run.preprocess.glob("*.tmp")) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(source: Path, tmp_path: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    with pytest.raises(PipelineError, match=r"has 0 MB free, but the shards need 1 MB; free some space or"):
        again(RunDir(tmp_path), source)
    assert list((tmp_path / "preprocess").iterdir()) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_write_is_told_and_what_was_good_stays_good(source: Path, undisturbed: RunDir, tmp_path: Path, jobs):
    """The limit on the size of files stands in for a full disk: only the smaller shards fit."""
    run = RunDir(tmp_path)
    limit = undisturbed.preprocess.joinpath("train-00000.h5").stat().st_size - 1
    code = f"""
import resource
from pathlib import Path
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir
from stages import preprocess
from tests.stages.test_preprocess import CONFIG
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    preprocess.run(CONFIG, RunDir(Path({str(run.root)!r})), source=Path({str(source)!r}), jobs={jobs})
except PipelineError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout.splitlines()[-1]
    assert "File too large" in done.stdout
    assert "Traceback" not in done.stderr
    assert list(run.preprocess.glob("*.tmp")) == []
    again(run, source)
    assert made(run) == made(undisturbed)


def test_without_a_source_the_demo_set_is_drawn_into_the_run(tmp_path: Path, monkeypatch, capsys):
    drawn = []

    def draw(folder: Path) -> None:
        drawn.append(folder)
        small_official(folder)

    monkeypatch.setattr(demo, "draw", draw)
    run = RunDir(tmp_path)
    again(run, None)
    again(run, None)
    (run.preprocess / "val-00000.h5").unlink()
    again(run, None)  # mended from the set that is there
    assert (run.preprocess / "val-00000.h5").exists()
    assert drawn == [tmp_path / "demo"]
    out = capsys.readouterr().out
    assert f"the built-in demo set is drawn into {tmp_path / 'demo'}" in out
    assert "9 training and 4 validation pictures of 3 classes" in out


def test_the_real_archives_are_accounted_for_to_the_last_picture(ilsvrc_mini: Path, tmp_path: Path):
    run = RunDir(tmp_path)
    config = dataclasses.replace(CONFIG, preprocess=Preprocess(size=64, shard_images=200))
    again(run, ilsvrc_mini, config, jobs=2)
    train, val = splits(run)
    assert (len(train), len(val)) == (611, 500)
    assert (run.preprocess / "rejects.jsonl").read_text() == ""
    reference = ilsvrc_mini.parent / "reference"
    published = dict(line.split() for line in (reference / "val.txt").read_text().splitlines())
    names = [name.decode() for name in sources(val).tolist()]
    assert val.labels.tolist() == [int(published[name]) for name in names]
    wnids = [line.split()[0] for line in (reference / "synset_words.txt").read_text().splitlines()]
    names = [name.decode() for name in sources(train).tolist()]
    assert [wnids[label] for label in train.labels.tolist()] == [name.partition("/")[0] for name in names]
    assert "n02105855/n02105855_2933.JPEG" in names  # the PNG
    # Published for the whole training set at size 256: deviations 121.8, 37.1, 19.7; first vector (.56, .58, .59).
    color = json.loads((run.preprocess / "color.json").read_text())
    np.testing.assert_allclose(np.sqrt(color["eigenvalues"]) * 255, [121.8, 37.1, 19.7], rtol=0.25)
    np.testing.assert_allclose(color["eigenvectors"][0], [0.56, 0.58, 0.59], atol=0.03)


def test_the_demo_set_is_drawn_alike_by_any_number_of_jobs(source: Path, tmp_path: Path):
    demo.draw(tmp_path / "demo", jobs=2, train=8, val=2)
    for name in (ilsvrc.TRAIN, ilsvrc.VAL, ilsvrc.DEVKIT):
        assert (tmp_path / "demo" / name).read_bytes() == (source / name).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_the_demo_set_has_the_oddities_of_the_real_one(source: Path):
    listing = read_source(source).splits["train"]
    files = {name.decode().partition("/")[2]: content(listing, row) for row, name in enumerate(listing.name.tolist())}
    assert files["n90000002_4.JPEG"].startswith(b"\x89PNG")
    assert b"Adobe" in files["n90000005_6.JPEG"][:200]
    assert Image.open(io.BytesIO(files["n90000008_3.JPEG"])).mode == "L"
    assert len(files["n90000011_7.JPEG"]) == 4000
    sizes = {len(data) for data in files.values()}
    assert len(sizes) > 80
    ids = [demo.devkit_id(label) for label in range(12)]
    assert sorted(ids) == list(range(1, 13)) != ids


def test_the_demo_sets_validation_pictures_are_mixed_and_of_the_class_that_the_devkit_says(source: Path):
    listing = read_source(source).splits["val"]
    labels = listing.label.tolist()
    assert labels != sorted(labels)
    for label in (3, 4):
        drawn = [demo._jpeg(demo.draw_picture(label, number)) for number in (8, 9)]
        found = [content(listing, row) for row in np.flatnonzero(listing.label == label).tolist()]
        assert sorted(found) == sorted(drawn)


def test_the_demo_set_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[object] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(demo, "_draw_class", lambda label, train, val: [jpeg(label)] * (train + val))
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("renamed"), replace(*paths)))
    folder = tmp_path / "demo"
    (tmp_path / "demo.tmp" / "left").mkdir(parents=True)  # by one that was killed
    demo.draw(folder, jobs=1, train=1, val=1)
    archives = {path.stat().st_ino for path in folder.iterdir()}
    assert len(archives) == 3
    assert events[-3:] == [folder.stat().st_ino, "renamed", tmp_path.stat().st_ino]
    assert set(events[:-3]) >= archives
    with pytest.raises(PipelineError, match=f"cannot write {folder}"):  # it is there already
        demo.draw(folder, jobs=1, train=1, val=1)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_single_class_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Most often a folder too few or too many in the path, and it trains to a perfect score."""
    for classes, said in ((1, True), (2, False)):
        root = pictures.draw(tmp_path / str(classes), {"train": (2,) * classes, "val": (1,) * classes})
        preprocess.run(CONFIG, RunDir(tmp_path / f"run{classes}"), source=root, jobs=1)
        assert (f"{root} has one class only, class0: there is nothing to tell apart" in capsys.readouterr().out) == said


def test_classes_without_a_validation_picture_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pictures.draw(tmp_path / "source", {"train": (2, 2, 2), "val": (1, 1, 1)})
    again(RunDir(tmp_path / "all"), root)
    assert "never measured" not in capsys.readouterr().out
    (root / "val" / "class1" / "val0.png").unlink()
    again(RunDir(tmp_path / "two"), root)
    assert (
        "preprocess: note: 1 of the 3 classes with training pictures has no validation picture, such as class1: "
        "its accuracy is never measured\n"
    ) in capsys.readouterr().out
    shutil.rmtree(root / "val" / "class2")
    again(RunDir(tmp_path / "one"), root)
    assert (
        "preprocess: note: 2 of the 3 classes with training pictures have no validation pictures, such as class1: "
        "their accuracy is never measured\n"
    ) in capsys.readouterr().out


def test_kaggles_tree_becomes_the_same_shards_and_is_mended_from_its_own_form(tmp_path: Path, capsys) -> None:
    """Shards differ from the archives' in the devkit's IDs alone, which Kaggle's files do not tell."""
    source, top = small_official(tmp_path / "source"), tmp_path / "kaggle"
    unpack_train(source, top / kaggle.FOLDER, as_tars=False)
    unpack_val(source, top / kaggle.FOLDER / "val")
    shown = {4: "n01", 2: "n01", 1: "n03", 3: "n02"}
    lines = [f"ILSVRC2012_val_{number:08d},{wnid} 1 2 3 4 " for number, wnid in shown.items()]
    (top / kaggle.LABELS).write_text("\n".join(["ImageId,PredictionString", *lines, ""]))
    (top / kaggle.FOLDER / "train" / "n01" / "broken.JPEG").write_bytes(b"no picture")
    archives, run = RunDir(tmp_path / "archives"), RunDir(tmp_path / "run")
    again(archives, source)
    again(run, top)
    assert read_manifest(run)["splits"]["train"]["rejects"] == 1
    for ours, theirs in zip(splits(run), splits(archives), strict=True):
        rows = [dict(zip(sources(one).tolist(), range(len(one)), strict=True)) for one in (ours, theirs)]
        assert rows[0].keys() == rows[1].keys()
        for name, row in rows[0].items():
            assert ours.labels[row] == theirs.labels[rows[1][name]]
            np.testing.assert_array_equal(ours.row(row), theirs.row(rows[1][name]))
    before = made(run)
    capsys.readouterr()
    again(run, top)
    assert "nothing to do" in capsys.readouterr().out
    (run.preprocess / "val-00000.h5").unlink()
    again(run, shutil.move(top, tmp_path / "moved"))
    assert made(run) == before
    (tmp_path / "moved" / kaggle.LABELS).write_text(
        "\n".join(["ImageId,PredictionString", *lines[:3], lines[3].replace("n02", "n03")])
    )
    with pytest.raises(PipelineError, match=r"from other pictures than .*moved holds"):
        again(run, tmp_path / "moved")
    (tmp_path / "moved" / kaggle.FOLDER / "train" / "n01" / "broken.JPEG").write_bytes(b"another")
    (tmp_path / "moved" / kaggle.LABELS).write_text("\n".join(["ImageId,PredictionString", *lines, ""]))
    with pytest.raises(PipelineError, match=r"from other pictures than .*moved holds"):
        again(run, tmp_path / "moved")


def test_files_and_folders_that_are_not_read_are_told_and_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = pictures.draw(tmp_path / "source", {"train": (2, 2), "val": (1, 1)})
    again(RunDir(tmp_path / "one"), root)
    assert "not read" not in capsys.readouterr().out
    (root / "train" / "readme.txt").write_text("text")
    (root / "val" / "class1" / "inner").mkdir()
    again(RunDir(tmp_path / "one"), root)
    assert "nothing to do" in capsys.readouterr().out
    again(RunDir(tmp_path / "other"), root)
    assert [line for line in capsys.readouterr().out.splitlines() if "not read" in line] == [
        "preprocess: note: train/ holds 1 loose file, such as readme.txt: it is not read",
        "preprocess: note: val/ holds 1 folder inside a class folder, such as class1/inner: it is not read",
    ]
    assert made(RunDir(tmp_path / "other")) == made(RunDir(tmp_path / "one"))


@pytest.mark.parametrize("how", ["cut short", "broken link"])
def test_a_rejected_picture_that_was_replaced_is_noticed(tmp_path: Path, how: str) -> None:
    """Written over in place, so that its folder looks as before."""
    root = pictures.draw(tmp_path / "source", {"train": (2, 2), "val": (1, 1)})
    path = root / "train" / "class0" / "train0.png"
    whole, elsewhere = path.read_bytes(), tmp_path / "elsewhere.png"
    if how == "broken link":
        path.unlink()
        path.symlink_to(elsewhere)
    else:
        path.write_bytes(whole[:1000])
    run = RunDir(tmp_path / "run")
    again(run, root)
    again(run, root)
    times = path.parent.stat().st_mtime_ns
    (elsewhere if how == "broken link" else path).write_bytes(whole)
    assert path.parent.stat().st_mtime_ns == times
    with pytest.raises(
        PipelineError, match=r"from other pictures than .*source holds.*, or remove .*preprocess to make"
    ):
        again(run, root)
    shutil.rmtree(run.preprocess)
    again(run, root)
    assert (run.preprocess / "rejects.jsonl").read_text() == ""
