"""What users do wrong and disks do: one plain sentence, exit status 1, and what was good before is still good."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest

from data import ilsvrc
from pipeline.checkpoint import checkpoints, load_checkpoint, newest_sound, save_checkpoint
from tests.command_line import QUICK, finish, pipeline, settings, start, wait_until
from tests.conftest import mounted
from tests.data import archives


def preprocess(run: Path, source: Path | None, *arguments: object):
    where = () if source is None else ("--source", source)
    return pipeline("--stage", "preprocess", "--run", run, "--jobs", 1, *where, *settings(*QUICK), *arguments)


def train(run: Path, *arguments: object):
    return pipeline("--stage", "train", "--run", run, *arguments)


def evaluate(run: Path, *arguments: object):
    return pipeline("--stage", "eval", "--run", run, *arguments)


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file below a folder, but for the lock, which names the last process."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, prepared: Path):
    """A run with one step trained."""
    run = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(prepared, run)
    train(run, "--steps", 1).done()
    yield run
    shutil.rmtree(run)


# Sources


def test_mistyped_source(tmp_path: Path, ilsvrc_mini: Path) -> None:
    run = tmp_path / "run"
    preprocess(run, ilsvrc_mini / "typo").refused(r"--source names .*ilsvrc-mini/typo, which is not a folder; check")
    preprocess(run, ilsvrc_mini / ilsvrc.VAL).refused(r"--source names .*_val\.tar, which is not a folder")
    pipeline("--stage", "preprocess", "--run", run, ILSVRC2012_ROOT="/no/where").refused(
        r"the environment variable ILSVRC2012_ROOT names /no/where, which is not a folder"
    )
    assert not run.exists()


def test_source_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    preprocess(tmp_path / "run", tmp_path / "source").refused(
        r"source holds neither the ILSVRC-2012 archives .* nor folders train/ and val/ .*; check --source$"
    )
    (tmp_path / "source" / "cats").mkdir()
    preprocess(tmp_path / "run", tmp_path / "source").refused(
        r"check --source, or sort the pictures of its folders into train/<class>/ and val/<class>/$"
    )
    assert not (tmp_path / "run").exists()  # nor a lock in it
    (tmp_path / "none.safetensors").touch()
    pipeline("--stage", "import", tmp_path / "none.safetensors", "--run", tmp_path / "run").refused("cannot import")
    assert not (tmp_path / "run").exists()


def test_a_run_among_the_pictures(tmp_path: Path, small_source: Path) -> None:
    """Its folders would become classes, or its train/ be the pictures', which --restart moves aside."""
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    shutil.copytree(small_source, source)
    elsewhere.mkdir()
    (elsewhere / "train").symlink_to(source / "train")
    before = sorted(source.rglob("*"))
    for run in (source, source / "train", source / "val" / "run", elsewhere):
        preprocess(run, source).refused("would lie among the pictures of .*; name another directory with --run")
    assert sorted(source.rglob("*")) == before
    preprocess(source / "runs" / "mine", source).done()
    preprocess(source / "runs" / "mine", source).done()
    kaggle = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    shutil.copytree(small_source, kaggle)
    for run in (kaggle, kaggle / "train" / "run"):
        preprocess(run, tmp_path / "kaggle").refused(
            "would lie among the pictures of .*/kaggle, and its folders would mix"
        )


def test_only_one_of_three_archives(tmp_path: Path, ilsvrc_mini: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / ilsvrc.TRAIN).symlink_to(ilsvrc_mini / ilsvrc.TRAIN)
    sentence = preprocess(tmp_path / "run", source).refused(rf"{source} has {ilsvrc.TRAIN} but not")
    assert ilsvrc.VAL in sentence
    assert ilsvrc.DEVKIT in sentence
    (source / ilsvrc.VAL).symlink_to(ilsvrc_mini / ilsvrc.VAL)
    sentence = preprocess(tmp_path / "run", source).refused(rf"but not {ilsvrc.DEVKIT}; put it beside them")
    assert "folder" not in sentence


def test_devkit_of_other_classes_or_another_ground_truth(tmp_path: Path, ilsvrc_mini: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in (ilsvrc.TRAIN, ilsvrc.VAL):
        (source / name).symlink_to(ilsvrc_mini / name)
    archives.write_devkit(source, archives.IDS, [1, 2, 3])
    preprocess(tmp_path / "run", source).refused(
        r"img_train\.tar holds the class n\d+, which .*devkit_t12\.tar\.gz does not know; they do not belong together"
    )
    devkit = ilsvrc.read_devkit(ilsvrc_mini / ilsvrc.DEVKIT)
    archives.write_devkit(source, devkit.ids, devkit.ground_truth[:100].tolist())
    preprocess(tmp_path / "run", source).refused(
        r"img_val\.tar holds ILSVRC2012_val_\d+\.JPEG, but the ground truth .* has 100 lines; they do not belong"
    )


@pytest.mark.parametrize("name", [ilsvrc.TRAIN, ilsvrc.VAL, ilsvrc.DEVKIT])
def test_archive_cut_short_in_the_middle(tmp_path: Path, ilsvrc_mini: Path, name: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for other in (ilsvrc.TRAIN, ilsvrc.VAL, ilsvrc.DEVKIT):
        (source / other).symlink_to(ilsvrc_mini / other)
    (source / name).unlink()
    size = (ilsvrc_mini / name).stat().st_size
    with open(ilsvrc_mini / name, "rb") as whole:
        (source / name).write_bytes(whole.read(size // 2))
    preprocess(tmp_path / "run", source).refused(rf"{name}.* is cut short.*; get it again")
    assert not list((tmp_path / "run").rglob("*.h5"))


def test_class_without_a_readable_picture(tmp_path: Path, small_source: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(small_source, source)
    for path in (source / "train" / "class3").iterdir():
        path.write_bytes(b"no picture at all")
    sentence = preprocess(run, source).refused(r"none of the training pictures of the class class3 can be read")
    rejects = run / "preprocess" / "rejects.jsonl"
    assert str(rejects) in sentence
    assert f"remove {run / 'preprocess'}" in sentence
    reasons = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert sorted(r["name"] for r in reasons) == [f"class3/train{i}.png" for i in range(4)]
    # The remedy, as told:
    shutil.rmtree(source / "train" / "class3")
    shutil.rmtree(source / "val" / "class3")
    shutil.rmtree(run / "preprocess")
    preprocess(run, source).done()


# Order and settings


def test_stages_out_of_order(tmp_path: Path, run: Path) -> None:
    empty = tmp_path / "empty"
    for stage in ("train", "eval", "report", "export", "watch", "verify"):
        pipeline("--stage", stage, "--run", empty).refused(
            rf"there is no run {empty}", rf"--stage preprocess --run {empty}"
        )
        assert not empty.exists()
    for stages in (("--stage", "report"), ()):  # not after everything has been trained
        pipeline(*stages, "--run", run, "--compare", empty).refused(
            rf"there is no run {empty}; name one with --compare"
        )
    empty.mkdir()
    for stage in ("train", "eval"):
        sentence = pipeline("--stage", stage, "--run", empty).refused(
            r"empty/preprocess/manifest\.json does not exist", rf"--stage preprocess --run {empty}"
        )
        assert "remove it" not in sentence
    evaluate(run).refused(rf"there is no checkpoint in {run}/train; train first: .*--stage train --run {run}")
    evaluate(run, "--checkpoint", "none.ckpt").refused(r"there is no checkpoint none\.ckpt")


def test_resume_with_another_recipe_or_other_settings(trained: Path) -> None:
    before = contents(trained)
    small = ("--set", "input.crop=67")  # the recipe alone would not fit these shards
    for arguments in (("--recipe", "caffe", *small), ("--set", "train.momentum=0.5"), ("--seed", 3)):
        sentence = train(trained, "--resume", "--steps", 1, *arguments).refused(
            r"step-00000001\.ckpt was trained with other settings: ",
            r"Resume with the settings of the run \(leave out .* --weights\)",
        )
        assert {"caffe": "recipe (seed there, caffe here)", 3: "seed (0 there, 3 here)"}.get(
            arguments[1], "train.momentum (0.9 there, 0.5 here)"
        ) in sentence
    assert contents(trained) == before


def test_resume_with_other_data(tmp_path: Path, run: Path, trained: Path, small_source: Path) -> None:
    shutil.copytree(trained / "train", run / "train")
    source = tmp_path / "source"
    shutil.copytree(small_source, source)
    shutil.copyfile(source / "train" / "class0" / "train0.png", source / "train" / "class0" / "train9.png")
    before = contents(run)
    preprocess(run, source).refused(
        rf"{run}/preprocess holds shards made from other pictures than {source} holds; give this run a directory"
    )
    assert contents(run) == before
    shutil.rmtree(run / "preprocess")
    preprocess(run, source).done()
    train(run, "--resume", "--steps", 1).refused(
        rf"step-00000001\.ckpt was trained on other data than {run}/preprocess holds now; restore that data, or"
    )
    assert contents(run / "train") == contents(trained / "train")


@pytest.mark.parametrize(
    ("setting", "differing"),
    [
        ("preprocess.size=90", r"preprocess\.size \(72 there, 90 here\)"),
        ("preprocess.filter=box", r"preprocess\.filter \(bicubic there, box here\)"),
        ("preprocess.shard_images=9", r"preprocess\.shard_images \(10 there, 9 here\)"),
    ],
)
def test_training_with_other_settings_of_the_stored_pictures(run: Path, setting: str, differing: str) -> None:
    before = contents(run)
    train(run, "--steps", 1, "--set", setting).refused(
        rf"the pictures in {run}/preprocess were made with other settings: {differing}; leave them as they are, or"
    )
    assert contents(run) == before


def test_preprocess_with_other_settings(run: Path, small_source: Path) -> None:
    before = contents(run)
    for arguments, differing in (
        (("--set", "preprocess.size=80"), r"preprocess\.size \(72 there, 80 here\)"),
        (("--seed", 2), r"seed \(0 there, 2 here\)"),
    ):
        preprocess(run, small_source, *arguments).refused(
            rf"made with other settings than asked for: {differing}; give this run a directory of its own with --run"
        )
    assert contents(run) == before


# Damage


def test_shard_of_another_shape_or_size(run: Path) -> None:
    shard = run / "preprocess" / "train-00001.h5"
    size = shard.stat().st_size
    with h5py.File(shard) as file:
        labels, attributes = file["labels"][()], dict(file.attrs)
    with h5py.File(shard, "w") as file:
        file["images"], file["labels"] = np.zeros((10, 64, 64, 3), np.uint8), labels
        file.attrs.update(attributes)
    train(run, "--steps", 1).refused(r"train-00001\.h5 is not the file that was written; ", "--stage preprocess")
    with open(shard, "r+b") as raw:
        raw.truncate(size)
    train(run, "--steps", 1).refused(
        r"train-00001\.h5 is not usable \(.*shape \(10, 64, 64, 3\)\)", "--stage preprocess"
    )
    assert not (run / "train").exists()


def test_damaged_picture_is_found_before_it_is_used(run: Path, trained: Path) -> None:
    shutil.copytree(trained / "train", run / "train")
    for name in ("train-00001.h5", "val-00000.h5"):
        shard = run / "preprocess" / name
        data = bytearray(shard.read_bytes())
        with h5py.File(shard) as file:
            data[file["images"].id.get_offset() + 12345] ^= 1
        shard.write_bytes(data)
    before = contents(run / "train")
    train(run, "--resume", "--epochs", 1).refused(r"train-00001\.h5 is damaged in picture 10: run .*--stage verify")
    evaluate(run).refused(r"val-00000\.h5 is damaged in picture 0")
    assert contents(run / "train") == before | {"metrics.jsonl": contents(run / "train")["metrics.jsonl"]}
    assert not (run / "eval").exists()


def test_an_epoch_whose_validation_fails_is_saved(run: Path) -> None:
    """Else a validation picture that cannot be read would cost all steps since the last checkpoint."""
    with h5py.File(run / "preprocess" / "val-00000.h5", "r+") as file:
        file["images"][0, 0, 0, 0] ^= 1
    train(run, "--epochs", 1).refused(r"val-00000\.h5 is damaged in picture 0")
    saved = newest_sound(run / "train")[0]
    assert saved is not None
    assert (saved.header["step"], saved.header["validation"]) == (6, None)
    assert not (run / "train" / "best.json").exists()
    assert "step 6 to 7, 6 steps an epoch" in train(run, "--resume", "--steps", 1).done().out


def test_checkpoint_cut_short(run: Path, trained: Path) -> None:
    shutil.copytree(trained / "train", run / "train")
    path = checkpoints(run / "train")[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = contents(run)
    evaluate(run).refused(r"step-00000001\.ckpt is damaged or no checkpoint.*; choose another with --checkpoint")
    result = train(run, "--resume", "--steps", 1)
    result.refused(rf"no checkpoint in {run}/train can be read; start over with --restart")
    assert "step-00000001.ckpt is damaged" in result.out
    assert contents(run) == before


def test_checkpoint_of_other_shapes_or_classes(run: Path, trained: Path) -> None:
    saved = load_checkpoint(checkpoints(trained / "train")[0])
    save_checkpoint(run / "train", 1, {**saved.header, "classes": 6}, saved.arrays)
    evaluate(run).refused(r"was trained on 6 classes, but the data have 5")
    save_checkpoint(run / "train", 1, {**saved.header, "wnids": list("abcde")}, saved.arrays)
    evaluate(run).refused(r"was trained on other classes than the data have")
    arrays = {**saved.arrays, "fc8.b": np.zeros(6, np.float32)}
    save_checkpoint(run / "train", 1, saved.header, arrays)
    evaluate(run).refused(r"step-00000001\.ckpt holds other arrays than its configuration says")
    train(run, "--resume", "--steps", 1).refused(r"step-00000001\.ckpt holds other arrays than this network has")


@pytest.mark.parametrize(
    "name", ["config.json", "preprocess/manifest.json", "preprocess/color.json", "preprocess/mean.npy"]
)
def test_damaged_description(run: Path, name: str) -> None:
    path = run / name
    data = path.read_bytes()
    place = data.index(b"1") if path.suffix == ".json" else len(data) // 2
    path.write_bytes(data[:place] + b"2" + data[place + 1 :])
    train(run, "--steps", 1).refused(
        path.name, r"damaged|is not the file that was written", "--recipe|--stage preprocess"
    )
    assert not (run / "train").exists()


def test_lost_configuration_is_taken_from_the_newest_checkpoint(run: Path, trained: Path) -> None:
    shutil.copytree(trained / "train", run / "train")
    path = run / "config.json"
    path.write_text(path.read_text().replace('"momentum": 0.9', '"momentum": 0.8'))
    train(run, "--resume", "--steps", 1).refused(
        r"config\.json does not match its own checksum", r"; remove config\.json, and the settings are taken from the"
    )
    path.unlink()
    assert "not used" not in evaluate(run).done().out
    result = train(run, "--resume", "--steps", 1).done()
    assert f"{path} is missing: the settings are those of {run}/train/step-00000001.ckpt\n" in result.out
    assert "resumed from" in result.out
    assert path.read_bytes() == (trained / "config.json").read_bytes()


def test_lost_configuration_and_no_sound_checkpoint(run: Path, trained: Path) -> None:
    shutil.copytree(trained / "train", run / "train")
    saved = checkpoints(run / "train")[0]
    saved.write_bytes(saved.read_bytes()[:1000])
    (run / "config.json").unlink()
    before = contents(run)
    for how in ("--resume", "--restart"):
        result = train(run, how, "--steps", 1)
        result.refused(
            rf"{run}/config\.json is missing, and no checkpoint in {run}/train can be read to take the settings from; ",
            "name the recipe with --recipe and changes with --set, and start over with --restart",
        )
        assert f"warning: the checkpoint {saved} is damaged" in result.out
    assert contents(run) == before
    train(run, "--restart", "--steps", 1, "--recipe", "seed", *settings(*QUICK)).done()


# Disks and processes


def test_two_processes_on_one_run(run: Path, small_source: Path) -> None:
    process = start("--stage", "train", "--run", run, "--steps", 1000)
    try:
        wait_until(lambda: (run / "train" / "metrics.jsonl").exists(), process)
        for stage in ("train", "preprocess", "verify"):
            pipeline("--stage", stage, "--run", run).refused(
                rf"{run} is in use by process {process.pid} on .*; wait for it to end, or .*--run"
            )
    finally:
        process.terminate()
    assert finish(process).status == 143


def test_full_disk_while_preprocessing(tmp_path: Path, small_source: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk, "size=900k"):
        preprocess(disk / "run", small_source).refused(
            rf"the disk of {disk}/run/preprocess has .* free, but the shards need .*; free some space or"
        )
        # Space that goes while the shards are being written:
        (disk / "other").write_bytes(bytes(400 << 10))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(_lying_about_free_space(tmp_path)))
            preprocess(disk / "run", small_source).refused(r"the disk is full: cannot write .*/preprocess/")
        assert not list(disk.rglob("*.tmp*"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        result = preprocess(disk / "run", small_source).done()
        assert " of them from before" in result.out
        pipeline("--stage", "verify", "--run", disk / "run").done()


def _lying_about_free_space(folder: Path) -> Path:
    """A sitecustomize module with which every disk seems to have room, as one does that fills up later."""
    home = folder / "site"
    home.mkdir()
    (home / "sitecustomize.py").write_text(
        "import shutil\n"
        "usage = shutil.disk_usage\n"
        "shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 40)\n"
    )
    return home


def test_disk_without_room_for_a_checkpoint(tmp_path: Path, prepared: Path, trained: Path) -> None:
    """Told before the first step, not after an hour; what a crash left over or will be removed is counted as free."""
    size = checkpoints(trained / "train")[0].stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk, f"size={size}"):  # and the pictures are there too
        run = disk / "run"
        shutil.copytree(prepared, run)
        before = contents(run)
        train(run, "--steps", 1).refused(
            rf"the disk of {run}/train has 1\d MB free, but a checkpoint needs 2\d MB; free some space or choose"
        )
        assert contents(run) == before
        subprocess.run(["mount", "-o", f"remount,size={size * 12 // 5}", str(disk)], check=True)
        (run / "train").mkdir()
        (run / "train" / "step-00000007.ckpt.tmp").write_bytes(bytes(size))
        (run / "train" / "step-00000008.ckpt.tmp").write_bytes(bytes(size))
        assert "in time the checkpoints may need" in train(run, "--steps", 1).done().out
        # With one more there is room for one only, but that of the cut-off write is to be had.
        (run / "train" / "step-00000007.ckpt.tmp").write_bytes(bytes(size))
        train(run, "--resume", "--steps", 1).done()
        before = contents(run)
        for how in ("--resume", "--restart"):
            train(run, how, "--steps", 1).refused(rf"the disk of {run}/train has \d+ MB free, but a checkpoint needs")
            assert contents(run) == before
        train(run, "--resume", "--steps", 1, "--set", "train.keep_checkpoints=1").done()


def test_full_disk_while_saving_a_checkpoint(tmp_path: Path, prepared: Path, trained: Path) -> None:
    size = checkpoints(trained / "train")[0].stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk, f"size={size * 19 // 10}"):
        run = disk / "run"
        shutil.copytree(prepared, run)
        result = train(run, "--steps", 3, "--set", "train.checkpoint_every=1")
        result.refused(rf"the disk is full: cannot write {run}/train/step-00000002\.ckpt; free some space and run")
        assert [path.name for path in checkpoints(run / "train")] == ["step-00000001.ckpt"]
        assert not list(disk.rglob("*.tmp"))
        pipeline("--stage", "verify", "--run", run).done()
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        assert "resumed from" in train(run, "--resume", "--steps", 1).done().out


def test_read_only_run_directory(tmp_path: Path, trained: Path, small_source: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk, "size=1g"):
        run = disk / "run"
        shutil.copytree(trained, run)
        before = contents(run)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for stage in ("preprocess", "train", "eval"):
            pipeline("--stage", stage, "--run", run).refused(
                rf"no permission to write {run}/lock \(Read-only file system\); choose a writable directory with --run"
            )
        preprocess(disk / "new", small_source).refused(rf"no permission to write {disk}/new")
        # What makes a page or a file of the run, too, has no other place for it than the run, or a copy of that.
        for stage in ("report", "export"):
            pipeline("--stage", stage, "--run", run).refused(
                rf"no permission to write {run}/{stage}\S* \(Read-only file system\); choose a writable directory with "
                r"--run \(copy the run there if it has begun\), or mend the permissions"
            )
        for stage in (("verify",), ("watch",), ("predict", next(small_source.glob("val/*/*")))):
            pipeline("--stage", *stage, "--run", run).done()
        assert contents(run) == before


def test_permission_lost_while_training(run: Path) -> None:
    folder = run / "train"
    process = start("--stage", "train", "--run", run, "--steps", 1000, "--set", "train.checkpoint_every=3")
    wait_until(lambda: len(checkpoints(folder)) > 0, process)
    # Mode bits do not stop root; an immutable folder does.
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", folder], check=False).returncode != 0:
        process.terminate()
        finish(process)
        pytest.skip("making a folder immutable needs root and ext4")
    try:
        finish(process).refused(rf"no permission to write {folder}/\S+ \(.*\); choose a writable directory")
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    pipeline("--stage", "verify", "--run", run).done()
    assert "resumed from" in train(run, "--resume", "--steps", 1).done().out


def test_pictures_of_ones_own_are_never_replaced_by_the_demo_set(run: Path, small_source: Path) -> None:
    (run / "preprocess" / "train-00001.h5").unlink()
    before = contents(run)
    preprocess(run, None).refused(r"was made from .*: add --source ", "or start a new run with --run")
    assert contents(run) == before
    preprocess(run, small_source).done()
