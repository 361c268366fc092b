"""The command line as a whole: exit statuses, usage, where the configuration comes from, all stages in one go."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import run_pipeline
from data.ilsvrc import TRAIN
from data.split import open_split
from pipeline.checkpoint import checkpoints
from pipeline.command_line import IN_ORDER, parse, without_effect
from pipeline.errors import PipelineError
from pipeline.ranks import ALONE
from pipeline.run_dir import RunDir, read_sealed, write_sealed
from stages import preprocess, train
from tests.command_line import QUICK, ROOT, finish, pipeline, settings, start, wait_until
from tests.pictures import sources


def usage(*arguments: object) -> str:
    """What a wrong command line is told; it touches nothing."""
    result = pipeline(*arguments)
    assert result.status == 2, result
    assert "Traceback" not in result.err
    return result.err


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Path]:
    """A folder ``train`` with the checkpoint of one step."""
    run = tmp_path_factory.mktemp("once") / "run"
    shutil.copytree(prepared, run)
    pipeline("--stage", "train", "--run", run, "--steps", 1).done()
    yield run / "train"
    shutil.rmtree(run)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--stage", "evaluate"], "invalid choice: 'evaluate'"),
        (["--stage", "train", "--stpes", "3"], "unrecognized arguments: --stpes"),
        (["--stage", "train", "--steps", "0"], "argument --steps: takes a whole number of at least 1, not '0'"),
        (["--stage", "train", "--steps", "many"], "argument --steps: takes a whole number of at least 1, not 'many'"),
        (["--stage", "train", "--steps", "1", "--epochs", "1"], "--steps"),
        (["--stage", "train", "--resume", "--restart"], "not allowed with argument --resume"),
        (["--stage", "eval", "--views", "5"], "argument --views: invalid choice: 5"),
        (["--stage", "train", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--stage", "train", "--seed", "x"], "argument --seed: invalid int value"),
        (["--stage", "preprocess", "--jobs", "2", "--scheduler", "tcp://a:1"], "not allowed with argument --jobs"),
        (["--stage", "train", "cat.jpg"], "unrecognized arguments: cat.jpg"),
        (["--stage", "predict"], "--stage predict needs IMAGE..."),
        (["--stage", "import", "a", "b"], "--stage import takes one file, not 2"),
        (["--stage", "preprocess", "--run", ""], "argument --run: takes a name, and this one is empty"),
        (["--stage", "preprocess", "--source", ""], "argument --source: takes a name, and this one is empty"),
        (["--stage", "train", "--config", ""], "argument --config: takes a name, and this one is empty"),
        (["--stage", "predict", ""], "takes a name, and this one is empty"),
    ],
)
def test_wrong_usage_is_status_2(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run_pipeline.main(arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_the_environment_the_way_to_it_is_told() -> None:
    command = [sys.executable, "-S", "run_pipeline.py", "--stage", "verify"]  # -S: without the packages
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: the packages are not installed for .*venv/bin/activate.*pip install \.\n", done.stderr)


def test_several_comparisons_add_up() -> None:
    assert parse(["--compare", "a", "--run", "b", "--compare", "c", "d"]).compare == ["a", "c", "d"]
    assert parse([]).compare == []


@pytest.mark.parametrize(
    ("line", "idle"),
    [
        ("", []),
        ("--recipe caffe --seed 3 --views 10 --epochs 2 --jobs 2", []),
        ("--format onnx --json --compare a", ["--json", "--format"]),
        ("--stage train --views 1 --check-archives --seed 3", ["--check-archives", "--views"]),
        ("--stage eval --recipe caffe --seed 3 --steps 2", ["--steps"]),  # eval itself tells of recipe and seed
        ("--stage predict a.jpg --set input.crop=70 --seed 3 --views 10", ["--set", "--seed"]),
        ("--stage report --compare a b --checkpoint best", []),
        ("--stage import a.ckpt --recipe caffe --seed 3", []),
        ("--stage verify --source a --debug --run b --device cpu", ["--source", "--device"]),
    ],
)
def test_flags_that_matter_to_no_stage_are_found(line: str, idle: list[str]) -> None:
    assert without_effect(parse(line.split())) == idle


def test_flags_that_matter_to_no_stage_are_named(prepared: Path, capsys: pytest.CaptureFixture) -> None:
    """Whoever predicts with --set would else believe that it had changed something."""
    assert run_pipeline.main(["--stage", "watch", "--run", str(prepared), "--set", "seed=1", "--jobs", "3"]) == 1
    assert "note: --stage watch makes no use of --jobs, --set\n" in capsys.readouterr().err


def test_the_default_recipe_is_told_once_to_those_who_name_none(
    tmp_path: Path, small_source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    told = "preprocess: note: no --recipe is named, so it is seed, which learns worse than original or caffe"
    arguments = ("--stage", "preprocess", "--source", small_source, "--jobs", 1, *settings("preprocess.size=224"))
    (tmp_path / "threads.toml").write_text("loader.threads = 2\n")
    (tmp_path / "network.toml").write_text("[network]\nfinal_relu = false\n")
    first = pipeline(*arguments, "--run", tmp_path / "run", "--config", tmp_path / "threads.toml").done().out
    assert first.count(told) == 1
    assert "add --recipe original" in first
    shutil.rmtree(tmp_path / "run" / "preprocess")
    assert told not in pipeline(*arguments, "--run", tmp_path / "run").done().out

    monkeypatch.setattr(preprocess, "run", lambda *_, **__: None)
    for number, (named, is_told) in enumerate(
        (
            (("--recipe", "seed"), False),
            (("--recipe", "caffe", "--set", "input.crop=224"), False),
            (("--config", str(tmp_path / "network.toml")), False),
            (("--set", "train.epochs=2"), True),
        )
    ):
        assert run_pipeline.main([*map(str, arguments), "--run", str(tmp_path / str(number)), *named]) == 0
        assert (told in capsys.readouterr().out) == is_told, named
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ILSVRC2012_ROOT", raising=False)
    assert run_pipeline.main(["--stage", "preprocess", "--run", "demo"]) == 0
    assert told not in capsys.readouterr().out


def test_preprocess_leaves_the_weights_to_begin_with_to_train(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_pipeline.main(["--stage", "preprocess", "--run", str(run), "--weights", "none.ckpt"]) == 0
    assert "note: --stage preprocess makes no use of --weights\n" in capsys.readouterr().err
    assert json.loads((run / "config.json").read_text())["train"]["weights"] is None


def test_the_help_of_a_stage_has_its_own_flags_only(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run_pipeline.main(["--stage", "eval", "--help"])
    shown = capsys.readouterr().out
    assert "--views" in shown
    assert "--resume" not in shown


def test_wrong_usage_of_the_real_process() -> None:
    assert "invalid choice" in usage("--stage", "evaluate")
    help_text = pipeline("--help").done().out
    for stage in ("preprocess", "train", "eval", "verify"):
        assert stage in help_text


def test_wrong_settings_are_plain_and_touch_nothing(tmp_path: Path, small_source: Path) -> None:
    run = tmp_path / "run"
    common = ("--stage", "preprocess", "--source", small_source, "--run", run)
    for wrong, told in {
        ("--recipe", "orignal"): "there is no recipe 'orignal' (did you mean original?)",
        ("--set", "train.batchsize=3"): "did you mean train.batch_size?",
        ("--set", "train.batch_size"): "has no '='",
        ("--set", "train.batch_size=three"): "takes a whole number, not 'three'",
        ("--set", "train.batch_size=0"): "train.batch_size must lie between 1 and",
        ("--seed", "-1"): "seed must lie between 0 and",
    }.items():
        pipeline(*common, *wrong).refused(re.escape(told))
    pipeline(*common, "--config", tmp_path / "none.toml").refused(r"cannot read the configuration file .*none\.toml")
    (tmp_path / "some.toml").write_text("train.batch_size = 0\n")
    pipeline(*common, "--config", tmp_path / "some.toml").refused(r"some\.toml: train\.batch_size must lie between")
    assert not run.exists()


def test_names_that_standard_output_has_no_letters_for_are_written_as_escapes(tmp_path: Path, prepared: Path) -> None:
    run = tmp_path / "Läufe"
    run.symlink_to(prepared)
    result = pipeline("--stage", "verify", "--run", run, PYTHONIOENCODING="ascii").done()
    assert rf"files of {tmp_path}/L\xe4ufe are sound" in result.out


def test_a_connection_that_breaks_is_not_taken_for_output_without_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def to_nobody(*_: object) -> None:
        here, there = socket.socketpair()
        there.close()
        with here:
            here.sendall(b"as to a cluster")

    monkeypatch.setattr(run_pipeline, "_run", to_nobody)
    assert run_pipeline.main(["--run", str(tmp_path)]) == 1
    assert capfd.readouterr().err == "error: Broken pipe; --debug shows where this happened\n"


def test_where_the_pictures_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ILSVRC2012_ROOT", raising=False)
    assert run_pipeline._source(None, must_exist=True) is None  # the demo set
    usual = Path("datasets/ilsvrc2012")
    usual.mkdir(parents=True)
    assert run_pipeline._source(None, must_exist=True) == usual
    monkeypatch.setenv("ILSVRC2012_ROOT", "away")
    assert run_pipeline._source(None, must_exist=False) == Path("away")
    with pytest.raises(PipelineError, match="the environment variable ILSVRC2012_ROOT names away, which is not a fold"):
        run_pipeline._source(None, must_exist=True)
    assert run_pipeline._source(str(usual), must_exist=True) == usual


def test_preprocessing_gets_the_flags_of_the_command_line(
    tmp_path: Path, small_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[object] = []
    monkeypatch.setattr(preprocess, "check_archives", got.append)
    monkeypatch.setattr(preprocess, "run", lambda config, run, **flags: got.append(flags))
    command = ["--stage", "preprocess", "--source", str(small_source), "--run", str(tmp_path)]
    flags = {"source": small_source, "jobs": 3, "scheduler": None}
    assert run_pipeline.main([*command, "--jobs", "3"]) == 0
    assert got == [flags]
    assert run_pipeline.main([*command, "--jobs", "3", "--check-archives"]) == 0
    assert got == [flags, small_source, flags]


def test_ranks_are_refused_where_there_is_nothing_to_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run_pipeline, "joined", lambda: contextlib.nullcontext(replace(ALONE, size=2)))
    for stage in ([], ["--stage", "preprocess"], ["--stage", "verify"]):
        assert run_pipeline.main([*stage, "--run", str(tmp_path / "run")]) == 1
        assert "error: 2 ranks can share --stage eval and --stage train only" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_output_without_a_reader_ends_a_stage_with_a_word(run: Path) -> None:
    command = [sys.executable, "run_pipeline.py", "--stage", "verify", "--run", str(run)]
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert result.returncode == 141, result
    assert "the output has no reader any more" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_not_taken_for_a_full_disk_of_the_run(unbuffered: str, run: Path) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "run_pipeline.py", "--stage", "verify", "--run", str(run)],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 1, result
    assert result.stderr.splitlines()[-1].startswith(
        "error: standard output cannot be written: No space left on device; send it elsewhere, or make room"
    )


def test_another_full_disk_is_not_taken_for_that_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_pipeline, "_run", full)
    assert run_pipeline.main(["--run", str(tmp_path)]) == 1
    assert capfd.readouterr().err == "error: No space left on device; --debug shows where this happened\n"


def test_numba_told_not_to_compile_is_refused_where_it_compiles(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    for stage in ([], ["--stage", "train"], ["--stage", "export"], ["--stage", "predict", "x.png"]):
        assert run_pipeline.main([*stage, "--run", str(run)]) == 1
        assert capsys.readouterr().err.startswith("error: NUMBA_DISABLE_JIT is set, and ")
    assert run_pipeline.main(["--stage", "verify", "--run", str(run)]) == 0
    for value in ("0", ""):
        monkeypatch.setenv("NUMBA_DISABLE_JIT", value)
        assert run_pipeline.main(["--stage", "export", "--run", str(run)]) == 1
        assert "train first" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = pipeline("--stage", "train", "--run", tmp_path, "--debug")
    assert result.status == 1
    assert "Traceback" in result.err
    assert "PipelineError" in result.err


def test_the_configuration_is_resolved_written_and_used_again(tmp_path: Path, small_source: Path) -> None:
    run, toml = tmp_path / "run", tmp_path / "mine.toml"
    toml.write_text("seed = 4\n[train]\nmomentum = 0.5\nlog_every = 7\n")
    pipeline(
        *("--stage", "preprocess", "--source", small_source, "--run", run, "--jobs", 1),
        *("--recipe", "caffe", "--config", toml, "--seed", 9, *settings(*QUICK)),
    ).done()
    config = read_sealed(run / "config.json", "")
    assert config["recipe"] == "caffe"
    assert config["seed"] == 9
    assert config["train"]["momentum"] == 0.5
    assert config["train"]["log_every"] == 1  # --set comes after --config
    assert config["network"]["bias"][1] == 0.1
    pipeline("--stage", "train", "--run", run, "--steps", 1, "--set", "train.weight_decay=0.25").done()
    changed = read_sealed(run / "config.json", "")
    assert changed["train"].pop("weight_decay") == 0.25
    config["train"].pop("weight_decay")
    assert config["train"].pop("order") == "auto"
    assert changed["train"].pop("order") == "uniform"  # settled by the first training, for all that follow
    assert changed == config


def test_what_the_shards_were_made_with_outlives_a_training_with_other_settings(run: Path, small_source: Path) -> None:
    made = read_sealed(run / "config.json", "")["preprocess"]
    others = ("--recipe", "caffe", "--seed", 2, *settings("input.crop=67", "train.batch_size=4"))
    pipeline("--stage", "train", "--run", run, "--steps", 1, *others).done()
    config = (run / "config.json").read_bytes()
    values = read_sealed(run / "config.json", "")
    assert (values["recipe"], values["seed"], values["preprocess"]) == ("caffe", 2, made)
    # The remedies that verify names work, with the manifest and without.
    for name in ("train-00001.h5", "manifest.json"):
        path = run / "preprocess" / name
        sound = path.read_bytes()
        path.write_bytes(sound[:-1] + b"?")
        command = pipeline("--stage", "verify", "--run", run).refused(name).partition("run_pipeline.py ")[2]
        pipeline(*command.split(), "--jobs", 1).done()
        assert path.read_bytes() == sound
        assert (run / "config.json").read_bytes() == config
    # And all stages in one go take up the training as it was.
    result = pipeline("--source", small_source, "--run", run, "--resume", "--steps", 1).done()
    assert "nothing to do" in result.out
    assert "step 1 to 2" in result.out
    page = (run / "report" / "index.html").read_text()
    assert re.search(r"--stage preprocess [^\n]*--recipe caffe --set preprocess\.size=72", page)
    assert re.search(r"--stage train --steps 2 [^\n]*--seed 2", page)


def test_a_seed_of_training_that_never_saved_outlives_mending(run: Path, small_source: Path) -> None:
    values = read_sealed(run / "config.json", "")
    write_sealed(run / "config.json", {**values, "seed": 2})  # as a start leaves it
    (run / "preprocess" / "train-00001.h5").unlink()
    pipeline("--stage", "preprocess", "--source", small_source, "--run", run, "--jobs", 1).done()
    assert read_sealed(run / "config.json", "") == {**values, "seed": 2}


def test_a_manifest_that_does_not_say_what_the_shards_were_made_with(run: Path, small_source: Path) -> None:
    """As earlier versions wrote it; a training on it goes on when the manifest has been made again."""
    path = run / "preprocess" / "manifest.json"
    manifest = read_sealed(path, "")
    made = manifest.pop("made_with")
    assert made == {"seed": 0, "preprocess": read_sealed(run / "config.json", "")["preprocess"]}
    write_sealed(path, manifest)
    pipeline("--stage", "train", "--run", run, "--steps", 1).done()
    pipeline("--stage", "preprocess", "--source", small_source, "--run", run).done()
    pipeline("--stage", "preprocess", "--run", run, "--set", "preprocess.filter=box").refused("with other settings")
    path.unlink()
    pipeline("--stage", "preprocess", "--source", small_source, "--run", run, "--jobs", 1).done()
    assert read_sealed(path, "")["made_with"] == made
    assert "resumed from" in pipeline("--stage", "train", "--run", run, "--resume", "--steps", 1).done().out


def test_all_stages_in_one_go_on_the_demo_set(tmp_path: Path) -> None:
    """No flag but the run directory and what makes it quick: the built-in set is drawn, trained on and evaluated."""
    run = tmp_path / "run"
    changes = (
        "preprocess.shard_images=200",
        "train.epochs=1",
        "train.batch_size=480",
        "train.checkpoint_every=100",
        "eval.batch_size=240",
    )
    result = pipeline("--run", run, *settings(*QUICK[:4], *changes)).done()
    assert "built-in demo set is drawn" in result.out
    assert "All stages are done" in result.out
    for name in ("preprocess/manifest.json", "train/latest.json", "eval/metrics.json", "eval/per_class.csv"):
        assert (run / name).is_file()
        assert name.partition("/")[0] in result.out
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    assert metrics["images"] == 240
    rejects = [json.loads(line) for line in (run / "preprocess" / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 1
    assert not list(run.rglob("*.tmp*"))
    # Once more: there are checkpoints, and both ways on are named.
    pipeline("--run", run).refused(r"add --resume .*--restart")


@pytest.mark.parametrize(
    ("compared", "page", "classes"), [(False, "index.html", 5), (True, "compare.html", 5), (False, "index.html", 6)]
)
def test_the_last_words_name_the_page_that_was_made(
    compared: bool, page: str, classes: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "preprocess").mkdir()
    (tmp_path / "preprocess" / "classes.json").write_text(json.dumps({"classes": [{}] * classes}))
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "metrics.json").write_text('{"views": 1, "step": 2, "images": 3, "top1": 0.5, "top5": 1}')
    run_pipeline._summary(RunDir(tmp_path), "demo", compared=compared)
    said = capsys.readouterr().out
    assert f"report/      {page}, " in said
    assert "names 50.0% correctly (top-1, centre view)" in said
    assert ("among its first five for 100.0%" in said) == (classes > 5)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_while_evaluating_leave_the_earlier_evaluation(
    run: Path, number: signal.Signals, status: int, trained_once: Path
) -> None:
    folder = run / "eval"
    folder.mkdir()
    (folder / "metrics.json").write_text("before")
    (run / "train").symlink_to(trained_once)
    process = start("--stage", "eval", "--run", run, "--views", 10, "--device", "reference")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("computing on the reference")
    process.send_signal(number)
    result = finish(process)
    assert result.status == status, result
    assert "everything finished so far is kept" in result.err
    assert "Traceback" not in result.err
    assert (folder / "metrics.json").read_text() == "before"
    assert [path.name for path in folder.iterdir()] == ["metrics.json"]


def test_a_terminal_of_one_column() -> None:
    assert "python run_pipeline.py --stage train" in pipeline("--stage", "train", "--help", COLUMNS="1").done().out


def test_closed_standard_streams_are_nothing(small_source: Path, run: Path, trained_once: Path, tmp_path: Path) -> None:
    """As a daemon may start it; the numbers of the closed streams must not go to files of the run."""
    arguments = ("--stage", "preprocess", "--source", small_source, "--run", tmp_path / "closed", *settings(*QUICK))
    result = pipeline(*arguments, launcher=("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"))
    assert (result.status, result.out, result.err) == (0, "", "")
    (run / "train").symlink_to(trained_once)
    result = pipeline("--stage", "predict", "--run", run, "-", launcher=("sh", "-c", 'exec "$@" <&-', "sh"))
    result.refused("1 of 1 pictures could not be read")
    assert "standard input: not a picture" in result.err
    launcher = ("sh", "-c", 'exec "$@" >&-', "sh")
    for stage in (("predict", next(small_source.glob("val/*/*"))), ("watch",)):
        assert pipeline("--stage", *stage, "--run", run, launcher=launcher).done().out == ""


def test_ctrl_c_while_modules_are_imported_ends_without_a_word(tmp_path: Path) -> None:
    """The first module of ours, and NumPy in the middle; later ones are imported inside main()."""
    for name in ("pipeline.checkpoint", "numpy.linalg"):
        (tmp_path / "sitecustomize.py").write_text(
            "import os, signal, sys\n"
            "class Finder:\n"
            "    @staticmethod\n"
            "    def find_spec(name, path=None, target=None):\n"
            f"        if name == {name!r}:\n"
            "            os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.meta_path.insert(0, Finder)\n"
        )
        result = pipeline("--stage", "verify", "--run", tmp_path / "none", PYTHONPATH=str(tmp_path))
        assert (result.status, result.out, result.err) == (130, "", "")


def test_ctrl_c_while_the_workers_start_stops_preprocessing(small_source: Path, tmp_path: Path) -> None:
    """A terminal's Ctrl-C reaches the whole group, workers that are still importing too."""
    process = start(
        *("--stage", "preprocess", "--source", small_source, "--run", tmp_path / "run", "--jobs", 2),
        *settings(*QUICK),
        launcher=("setsid",),
    )

    def imports(folder: Path) -> bool:
        """Whether this process is a worker that has got as far as NumPy."""
        try:
            if os.getsid(int(folder.name)) != process.pid or b"popen_loky" not in (folder / "cmdline").read_bytes():
                return False
            return b"_multiarray_umath" in (folder / "maps").read_bytes()
        except OSError:
            return False

    wait_until(lambda: any(map(imports, Path("/proc").glob("[0-9]*"))), process)
    os.killpg(process.pid, signal.SIGINT)
    result = finish(process)
    assert result.status == 130, result
    assert "the same command goes on from there" in result.err
    assert "Traceback" not in result.err, result.err


@pytest.mark.parametrize(
    ("stage", "last", "number", "status"),
    [(preprocess, "forget_damage", signal.SIGINT, 130), (train, "save", signal.SIGTERM, 143)],
)
def test_a_signal_in_the_last_moment_of_a_stage_stops_before_the_next(
    small_source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: ModuleType,
    last: str,
    number: signal.Signals,
    status: int,
) -> None:
    run, name, before = tmp_path / "run", stage.__name__.rpartition(".")[2], getattr(stage, last)

    def and_signal(*arguments: object) -> None:
        before(*arguments)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(stage, last, and_signal)
    arguments = ["--source", str(small_source), "--run", str(run), "--jobs", "1", "--steps", "1", *settings(*QUICK)]
    assert run_pipeline.main(arguments) == status
    assert f"stopped after the stage {name}; everything finished so far is kept" in capsys.readouterr().err
    assert (run / "config.json").exists()
    following = IN_ORDER[IN_ORDER.index(name) + 1]
    assert not (run / following).exists()
    # On its own the stage is done, and says so.
    shutil.rmtree(run / name)
    assert run_pipeline.main([*arguments, "--stage", name]) == 0
    shutil.rmtree(run)


def test_sigint_while_training_saves_and_is_status_130(run: Path) -> None:
    process = start("--stage", "train", "--run", run, "--steps", 1000)
    wait_until(
        lambda: (run / "train" / "metrics.jsonl").exists() and (run / "train" / "metrics.jsonl").stat().st_size > 0,
        process,
    )
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert result.status == 130, result
    assert "everything is saved; go on with" in result.err
    assert len(checkpoints(run / "train")) >= 1


def test_ilsvrc_mini_by_the_official_archives(tmp_path: Path, ilsvrc_mini: Path, shared_data: Path) -> None:
    """Real archives through all three stages; every picture is accounted for and labels agree with the reference."""
    run = tmp_path / "run"
    pipeline(
        *("--stage", "preprocess", "--source", ilsvrc_mini, "--run", run, "--recipe", "original"),
        *settings(*QUICK, "preprocess.shard_images=200", "eval.batch_size=100"),
    ).done()
    pipeline("--stage", "train", "--run", run, "--steps", 2).done()
    pipeline("--stage", "eval", "--run", run, "--views", 1).done()
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    assert metrics["images"] == 500
    manifest = read_sealed(run / "preprocess" / "manifest.json", "")
    counts = {split: (part["images"], part["rejects"]) for split, part in manifest["splits"].items()}
    assert counts == {"train": (611, 0), "val": (500, 0)}
    reference = dict(line.split() for line in (shared_data / "reference" / "val.txt").read_text().splitlines())
    split = open_split(run / "preprocess", manifest, "val")
    for name, label in zip(sources(split).tolist(), split.labels.tolist(), strict=True):
        assert int(reference[name.decode()]) == label
    with np.load(run / "eval" / "predictions.npz", allow_pickle=False) as predictions:
        assert np.array_equal(predictions["labels"], split.labels)
        assert predictions["top"].shape == (500, 5)


def test_a_run_beside_the_archives_is_not_among_the_pictures(tmp_path: Path) -> None:
    """Its train/ holds checkpoints: the pictures are in the archives."""
    (tmp_path / "train").mkdir()
    with pytest.raises(PipelineError, match="would lie among the pictures"):
        run_pipeline._refuse_among_pictures(RunDir(tmp_path), tmp_path)
    (tmp_path / TRAIN).touch()
    run_pipeline._refuse_among_pictures(RunDir(tmp_path), tmp_path)


def test_a_source_that_is_gone_matters_to_preprocessing_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As where the disk that $ILSVRC2012_ROOT names is not mounted while a network is trained on its shards."""
    monkeypatch.setenv("ILSVRC2012_ROOT", "/no/where")
    assert run_pipeline.main(["--stage", "verify", "--run", str(run)]) == 0
    assert run_pipeline.main(["--stage", "preprocess", "--run", str(run)]) == 1
    assert "ILSVRC2012_ROOT names /no/where" in capsys.readouterr().err
