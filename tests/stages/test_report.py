"""The report: the numbers it shows, the pictures it draws, and the page as a real browser shows it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

import run_pipeline
from net.layers import Relu
from pipeline.command_line import parse
from pipeline.config import RECIPES
from pipeline.config_values import as_text, changes
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir
from stages import report
from stages.report import charts, facts, pictures
from stages.report.facts import Facts
from stages.trained import load_trained
from tests.browser import Browser, chromium, missing
from tests.command_line import pipeline

CLASSES = [{"wnid": f"n{i}", "words": words} for i, words in enumerate(["cat, house cat", "dog", "owl", ""])]


@pytest.fixture
def known(tmp_path: Path) -> Facts:
    """Ten steps and six predictions, by hand: two cats right, one taken for a dog, two dogs for cats, an owl right."""
    step = {"epoch": 0, "lr": 0.01, "images_per_second": 50.0, "data_wait": 0.1}
    steps = [{**step, "step": i, "loss": 10.0 - i} for i in range(1, 11)]
    steps[7:] = [{**record, "lr": 0.001, "epoch": 1} for record in steps[7:]]
    return Facts(
        run=RunDir(tmp_path / "by hand"),
        config=replace(RECIPES["demo"], seed=7),
        step=10,
        seal="0" * 64,
        checkpoint="step-00000010.ckpt",
        classes=CLASSES,
        manifest={"splits": {"train": {"images": 224}}},  # 7 steps an epoch
        steps=steps,
        validations=[{"step": 7, "top1": 0.5, "top5": 0.9, "validation_loss": 1.5}],
        evaluation={"images": 6, "loss": 1.0, "top1": 0.5, "top5": 1.0, "views": 1, "step": 10},
        predictions={
            "labels": np.array([0, 0, 0, 1, 1, 2], np.int32),
            "top": np.array([[0, 1], [0, 2], [1, 0], [0, 1], [0, 2], [2, 3]], np.int32),
            "probability": np.array([[0.9, 0.1], [0.6, 0.2], [0.8, 0.1], [0.7, 0.2], [0.95, 0.01], [0.5, 0.4]], "f4"),
            "loss": np.ones(6),
        },
    )


def test_accuracy_of_each_class(known: Facts) -> None:
    cat, dog, owl = facts.per_class(known)
    assert (cat["name"], cat["images"], cat["top1"], cat["top5"]) == ("cat", 3, pytest.approx(2 / 3), 1.0)
    assert (cat["taken_for"], cat["taken_for_count"]) == ("dog", 1)
    assert (dog["top1"], dog["top5"], dog["taken_for"], dog["taken_for_count"]) == (0.0, 0.5, "cat", 2)
    assert (owl["top1"], owl["taken_for"]) == (1.0, "")


def test_confusions_most_frequent_first(known: Facts) -> None:
    assert [(c["true"], c["said"], c["count"], c["back"]) for c in facts.confusions(known)] == [
        ("dog", "cat", 2, 1),
        ("cat", "dog", 1, 2),
    ]
    assert facts.confusions(known)[1]["share"] == pytest.approx(1 / 3)


def test_confident_pictures_surest_first(known: Facts) -> None:
    assert facts.confident(known, right=False, most=2) == [4, 2]
    assert facts.confident(known, right=True, most=9) == [0, 5]  # one a class
    assert known.predictions is not None
    known.predictions["probability"][5, 0] = 0.99
    assert facts.confident(known, right=True, most=9) == [5, 0]


def test_the_speed_is_the_median(known: Facts) -> None:
    known.steps[0]["images_per_second"] = 1.0  # compiling
    assert known.rate == 50.0


def test_commands_are_taken_by_the_command_line(known: Facts) -> None:
    changed = changes(settings=["train.lr=[[0,0.5]]", "input.mean=none", "input.flip=false"])(known.config)
    lines = facts.commands(replace(known, config=changed))
    options = [parse(shlex.split(line)[2:]) for line in lines]
    assert [o.stage for o in options] == ["preprocess", "train", "eval", "report"]
    assert changes(None, options[0].set, options[0].seed)(RECIPES[options[0].recipe]) == changed
    assert options[1].steps == 10
    assert {o.run for o in options} == {str(known.run.root)}
    assert {o.device for o in options[1:]} == {"auto"}  # not known of a checkpoint from elsewhere
    for line in facts.commands(replace(known, device="gpu", precision="bf16"))[1:]:
        option = parse(shlex.split(line)[2:])
        assert (option.device, option.precision) == ("gpu", "bf16")
    assert "--precision" not in facts.commands(replace(known, precision="bf16"))[1]
    on_cpu = facts.commands(replace(known, device="cpu"))[1]
    assert "--device cpu" in on_cpu
    assert "--precision" not in on_cpu
    imported = parse(shlex.split(facts.commands(replace(known, step=0, imported="a net.caffemodel"))[1])[2:])
    assert (imported.stage, imported.files) == ("import", ["a net.caffemodel"])


@pytest.mark.parametrize("beside", ["run-pictures", "run/pictures"])
def test_commands_name_pictures_that_lie_beside_or_in_the_run(known: Facts, tmp_path: Path, beside: str) -> None:
    run = RunDir(tmp_path / "run")
    run.preprocess.mkdir(parents=True)
    lines = [{"source": str(tmp_path / beside)}, {"source": 3}]
    (run.preprocess / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert f"--source {tmp_path / beside} " in facts.commands(replace(known, run=run))[0]
    with open(run.preprocess / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"source": str(run.root / "demo")}) + "\n")
    assert "--source" not in facts.commands(replace(known, run=run))[0]


def test_commands_name_the_pictures_and_the_views(known: Facts) -> None:
    known.run.preprocess.mkdir(parents=True)
    log = known.run.preprocess / "metrics.jsonl"
    for source, named in ((f"{known.run.root}/demo", False), (f"{known.run.root}'s pictures", True)):
        log.write_text(json.dumps({"source": source}) + "\n")
        assert parse(shlex.split(facts.commands(known)[0])[2:]).source == (source if named else None)
    assert known.evaluation is not None
    ten = facts.commands(replace(known, evaluation={**known.evaluation, "views": 10}))
    assert parse(shlex.split(ten[2])[2:]).views == 10


def test_settings_are_written_as_the_command_line_takes_them() -> None:
    values = (None, True, 0.5, [[0, 0.1]], "center")
    assert [as_text(value) for value in values] == ["none", "true", "0.5", "[[0, 0.1]]", "center"]


def test_commands_name_pictures_whose_folder_begins_like_the_run(known: Facts) -> None:
    (known.run.root / "preprocess").mkdir(parents=True)
    for source, named in (("by hand pictures", True), ("by hand/demo", False)):
        line = json.dumps({"finished": "", "source": str(known.run.root.parent / source)})
        (known.run.root / "preprocess" / "metrics.jsonl").write_text(f"{line}\n")
        assert ("--source" in facts.commands(known)[0]) == named


def test_an_order_settled_by_training_is_no_change_of_the_recipe(known: Facts) -> None:
    for recipe in RECIPES.values():
        for order in ("uniform", "blocks"):
            settled = changes(settings=[f"train.order={order}"])(recipe)
            assert [s["key"] for s in facts.settings(settled) if s["changed"]] == []
            # But another machine might settle it otherwise.
            first = parse(shlex.split(facts.commands(replace(known, config=settled))[0])[2:])
            assert first.set == [f"train.order={order}"]
    mine = changes(settings=["train.order=blocks", "train.momentum=0.5"])(RECIPES["seed"])
    assert [s["key"] for s in facts.settings(mine) if s["changed"]] == ["train.momentum"]


def test_commands_have_each_stages_own_seed_and_settings(known: Facts) -> None:
    """Shards made with one seed, trained on with another; and the rest of the settings is the recipe's."""
    made = {"seed": 3, "preprocess": {**vars(known.config.preprocess), "filter": "box"}}
    shards = {**known.manifest, "made_with": made}
    trained = changes(settings=["preprocess.filter=box"])(known.config)
    for seed in (0, 7):
        lines = facts.commands(replace(known, manifest=shards, config=replace(trained, seed=seed)))
        first, second = (parse(shlex.split(line)[2:]) for line in lines[:2])
        assert (first.seed, first.set) == (3, ["preprocess.filter=box"])
        assert (second.seed, second.set) == (seed, None)
    assert "--seed" not in facts.commands(replace(known, manifest=shards, config=replace(trained, seed=3)))[1]


def test_norms_are_means_of_absolute_values(trained_run: Path) -> None:
    trained = load_trained(RunDir(trained_run), "latest")
    parameters = {"conv1.w": np.array([[1.0, -3.0]], "f4"), "conv1.b": np.zeros(2, "f4")}
    momenta = {"conv1.w": np.array([[0.5, 0.5]], "f4"), "conv1.b": np.ones(2, "f4")}
    (row,) = facts.norms(replace(trained, parameters=parameters, momenta=momenta))
    assert row["w"] == {"size": 2.0, "change": 0.5, "ratio": 0.25}
    assert row["b"] == {"size": 0.0, "change": 1.0, "ratio": None}
    (row,) = facts.norms(replace(trained, parameters=parameters, momenta={}))
    assert row["w"]["change"] is None


def test_curves(known: Facts) -> None:
    six = replace(known, classes=[*CLASSES, *CLASSES[:2]])
    loss, accuracy, speed, wait = charts.charts([six], sampled=0.75)
    assert loss.log
    training, validation = loss.series
    assert training.points[0] == (pytest.approx(1 / 7), 9.0)
    assert validation.points == [(1.0, 1.5)]
    assert loss.marks == [(1.0, "lr 0.001")]
    assert [s.points for s in accuracy.series] == [[(1.0, 0.5)], [(1.0, 0.9)], [(pytest.approx(10 / 7), 0.75)]]
    assert speed.series[0].points[3][1] == 50.0
    assert accuracy.unit == wait.unit == "percent"
    assert loss.data()["series"][0]["points"][0] == [0.14286, 9.0]
    warming = [{**record, "lr": 0.1} if record["step"] > 7 else record for record in known.steps]
    assert charts.charts([replace(known, steps=warming)])[0].marks == [(1.0, "lr 0.1")]
    for count, marks in ((charts.MOST_MARKS, charts.MOST_MARKS), (charts.MOST_MARKS + 1, 0)):
        falling = [{**known.steps[0], "step": n + 1, "epoch": n, "lr": 1 / (n + 1)} for n in range(count + 1)]
        assert len(charts.charts([replace(known, steps=falling)])[0].marks) == marks


def test_curves_of_several_runs(known: Facts) -> None:
    two = charts.charts([known, replace(known, run=RunDir(Path("other")))], sampled=0.75)
    assert [s.name for s in two[0].series if s.style == "line"] == ["by hand: training", "other: training"]
    assert [s.colour for s in two[0].series] == [0, 0, 1, 1]
    assert [s.name for s in two[1].series] == ["by hand: validation top-1", "other: validation top-1"]
    assert two[0].marks == []
    nine = charts.charts([known] * 9)  # more than there are colours
    assert {s["colour"] for s in nine[0].data()["series"]} == set(range(8))
    assert Image.open(__import__("io").BytesIO(charts.curves_png(nine))).width > 1000


def test_what_there_are_no_lines_of_is_not_drawn(known: Facts) -> None:
    assert charts.charts([replace(known, steps=[], validations=[])]) == []
    assert [chart.key for chart in charts.charts([replace(known, steps=[])])] == ["loss", "accuracy"]


def test_long_curves_are_smoothed_and_thinned() -> None:
    points = [(float(i), float(i % 2)) for i in range(6000)]
    assert all(0.45 < y < 0.55 for _, y in charts._moving_mean(points)[200:])
    assert charts._moving_mean([(i, i) for i in range(120)])[4:6] == [(4, 3.5), (5, 4.5)]
    assert charts._moving_mean(points[:100]) == []
    thin = charts._thinned(points)
    assert len(thin) == charts.MOST_POINTS
    assert thin[0] == (4.5, 0.5)


def test_filters_are_shown_in_red_green_blue(trained_run: Path) -> None:
    trained = load_trained(RunDir(trained_run), "latest")
    w = np.zeros((11, 11, 3, 96), np.float32)
    w[2, 5, 0, 17] = 0.25  # filter 17 is in the second row of 16, second column
    w[:, :, :, 0] = -1
    trained = replace(trained, parameters={"conv1.w": w})
    image = np.asarray(pictures.filters(trained))
    assert image.shape == (6 * 12 - 1, 16 * 12 - 1, 4)
    assert image[12 + 2, 12 + 5].tolist() == [255, 127, 127, 255]
    assert image[0, 0].tolist() == [0, 0, 0, 255]
    assert image[0, 11, 3] == 0  # between the tiles
    bgr = replace(trained, config=changes(settings=["input.bgr=true"])(trained.config))
    assert np.asarray(pictures.filters(bgr))[12 + 2, 12 + 5].tolist() == [127, 127, 255, 255]


def test_jitter_moves_along_the_eigenvectors() -> None:
    square = np.full((128, 128, 3), 100, np.uint8)
    directions = np.array([[40.0, 0, 0], [0, 20.0, 0], [0, 0, 10.0]])
    image = np.asarray(pictures.jitter(square, directions, 0.1))
    assert image[5, 5].tolist() == [88, 100, 100, 255]  # 3 standard deviations of 0.1 x 40 less red
    assert image[5, 2 * 132 + 5].tolist() == [100, 100, 100, 255]
    assert image[5, 132 + 5].tolist() == [94, 100, 100, 255]
    assert image[132 + 5, 4 * 132 + 5].tolist() == [100, 106, 100, 255]
    assert image[264 + 5, 3 * 132 + 5].tolist() == [100, 100, 102, 255]  # 1.5, halves to even


def test_activations_follow_the_layers(trained_run: Path) -> None:
    from net import reference

    trained = load_trained(RunDir(trained_run), "latest")
    square = np.random.default_rng(3).integers(0, 256, (72, 72, 3), dtype=np.uint8)
    ends_in_relu = replace(trained, layers=(*trained.layers, Relu()))  # of the scores no maps are shown
    (maps,) = pictures.activations(ends_in_relu, reference, [square])
    assert [m.title for m in maps] == [
        "conv1 · ReLU",
        "conv1 · ReLU · LRN · pool",
        "conv2 · ReLU",
        "conv2 · ReLU · LRN · pool",
        "conv3 · ReLU",
        "conv4 · ReLU",
        "conv5 · ReLU",
        "conv5 · ReLU · pool",
        "fc6 · ReLU",
        "fc7 · ReLU",
    ]
    assert maps[0].shape == "15 x 15 x 96"
    assert maps[-1].shape == "250 units"


def test_activations_of_a_layer_that_somebody_added(trained_run: Path) -> None:
    from net import reference

    class Doubled(Relu):
        pass

    trained = load_trained(RunDir(trained_run), "latest")
    square = np.zeros((72, 72, 3), np.uint8)
    (maps,) = pictures.activations(replace(trained, layers=(trained.layers[0], Doubled())), reference, [square])
    assert [m.title for m in maps] == ["conv1 · Doubled"]


def test_the_strongest_maps_are_shown_strongest_first() -> None:
    y = np.zeros((2, 2, 20), np.float32)
    y[1] = np.arange(20)
    maps = pictures._maps("title", y)
    assert (maps.shape, maps.note) == ("2 x 2 x 20", "the 16 strongest; 19 of 20 maps respond")
    image = np.asarray(maps.image)
    side = 52 + 2
    assert image.shape == (2 * side - 2, 8 * side - 2, 4)
    assert image[51, 0].tolist() == [*pictures._MAGMA[-1], 255]
    brightness = [int(image[row + 51, column, 1]) for row in (0, side) for column in range(0, 8 * side, side)]
    assert brightness == sorted(brightness, reverse=True)
    dead = pictures._coloured(np.zeros((1, 2, 2), np.float32))
    assert (dead == pictures._MAGMA[0]).all()


def test_the_last_row_need_not_be_full() -> None:
    tiles = np.zeros((3, 10, 20, 3), np.uint8)
    assert pictures.tiled(tiles, 2, gap=4).size == (44, 24)
    full, more = pictures._COLUMNS, pictures._COLUMNS + 1
    one, two = (pictures.sheet(list(tiles[:1]) * count, [["text"]] * count) for count in (full, more))
    assert two.height > 1.9 * one.height


def test_captions_have_more_letters_than_ascii() -> None:
    square = np.zeros((8, 8, 3), np.uint8)
    sheets = [np.asarray(pictures.sheet([square], [[letter]])) for letter in "äéßжΩ"]
    assert len({sheet.tobytes() for sheet in sheets}) == len(sheets), "a box for each"


def test_a_name_whose_letters_cannot_be_drawn_is_the_classs_number() -> None:
    for name in ("tabby cat", "äéß, жΩ", ""):
        assert pictures.drawable(name, 7) == name
    for name in ("\u732b", "cat \u732b", "\u0939\u093f\u0928\u094d\u0926\u0940"):
        assert pictures.drawable(name, 7) == "class 7"


def test_captions_fit_below_their_pictures() -> None:
    draw, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), pictures._font(12)
    fitted = pictures._fitted(draw, "W" * 60, font, 192)
    assert draw.textlength(fitted, font=font) <= 192 < draw.textlength(f"W{fitted}W", font=font)
    assert fitted.endswith("W...")
    assert pictures._fitted(draw, "i" * 40, font, 192) == "i" * 40


def test_the_tile_says_how_far_training_went(known: Facts) -> None:
    trained = SimpleNamespace(header={}, parameters={}, classes=CLASSES)

    def note(step: int) -> str:
        return next(
            tile["note"] for tile in report._tiles(replace(known, step=step), trained) if tile["title"] == "Trained"
        )

    assert note(7) == "steps, 1 of 4 epochs"
    assert note(35) == "steps, 5 epochs; the recipe has 4"


def test_a_long_class_name_does_not_hide_the_probability() -> None:
    split = SimpleNamespace(row=lambda index: np.zeros((8, 8, 3), np.uint8))
    name = "a class with a name longer than a picture is wide"
    classes = {"said": name, "said_class": 1, "true": name, "true_class": 2}
    one, other = (
        report._sheet(split, [{"index": 0, **classes, "probability": p}], right=False).tobytes() for p in (0.512, 0.998)
    )
    assert one != other


def test_classes_whose_names_cannot_be_drawn_are_told_apart() -> None:
    split = SimpleNamespace(row=lambda index: np.zeros((8, 8, 3), np.uint8))
    cat, dog = {"said": "\u732b", "said_class": 1}, {"said": "\u72ac", "said_class": 2}
    one, other = (report._sheet(split, [{"index": 0, **p, "probability": 0.5}], right=True) for p in (cat, dog))
    assert one.tobytes() != other.tobytes()


@pytest.fixture(scope="module")
def page(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The report of a run whose name would be markup; its checkpoint is hard-linked, not copied."""
    run = tmp_path_factory.mktemp("report") / "<b>run&<img src=x onerror=alert(1)>"
    shutil.copytree(trained_run, run, copy_function=os.link)
    # Written in place by a real run; here a copy, so that the other tests' run stays as it is.
    (run / "config.json").unlink()
    shutil.copy(trained_run / "config.json", run / "config.json")
    assert run_pipeline.main(["--stage", "report", "--run", str(run)]) == 0
    yield run / "report" / "index.html"
    shutil.rmtree(run)


def test_page_is_self_contained_and_escaped(page: Path) -> None:
    text = page.read_text()
    addresses = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)["']""", text)
    assert addresses
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "<img src=x" not in text
    assert "&lt;b&gt;run&amp;" in text
    assert len(text) < 2_000_000


def test_page_where_text_is_not_utf8_by_itself(page: Path, trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "preprocess", "train", "eval"):
        (run / name).symlink_to(trained_run / name)
    pipeline("--stage", "report", "--run", run, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0").done()
    style = re.compile(r"<style>.*?</style>", re.DOTALL)
    assert style.findall((run / "report" / "index.html").read_text("utf-8")) == style.findall(page.read_text("utf-8"))


def test_page_of_a_run_whose_name_is_no_utf8(trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / os.fsdecode(b"run\xff")
    run.mkdir()
    for name in ("config.json", "preprocess", "train", "eval"):
        (run / name).symlink_to(trained_run / name)
    result = pipeline("--stage", "report", "--run", run, PYTHONIOENCODING="utf-8:strict").done()
    assert r"run\udcff/report/index.html" in result.out
    assert r"run\udcff" in (run / "report" / "index.html").read_text("utf-8")


def test_the_first_five_of_five_classes_are_not_counted(page: Path) -> None:
    text = page.read_text()
    assert "Top-1" in text
    assert "validation top-1" in text
    assert "top-5" not in text.lower()


def test_an_order_that_the_recipe_leaves_open_is_named(page: Path) -> None:
    assert "The recipe leaves train.order open (auto); here it was uniform." in page.read_text()


def test_pictures_lie_beside_the_page(page: Path) -> None:
    names = sorted(path.name for path in page.parent.glob("*.png"))
    assert {"curves.png", "filters.png", "jitter.png", "activations-1.png", "confident-wrong.png"} <= set(names)
    for name in names:
        with Image.open(page.parent / name) as image:
            image.load()
            assert image.width >= 500, name


def test_page_before_the_evaluation(trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, copy_function=os.link, ignore=shutil.ignore_patterns("eval", "export", "report"))
    assert run_pipeline.main(["--stage", "report", "--run", str(run)]) == 0
    text = (run / "report" / "index.html").read_text()
    assert "Not evaluated yet" in text
    assert 'id="classes"' not in text
    shutil.rmtree(run)


def test_an_evaluation_of_another_checkpoint_of_the_same_step_is_told(trained_run: Path, tmp_path: Path) -> None:
    """As after --restart with another recipe: the step is the same, the network is not."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, copy_function=os.link, ignore=shutil.ignore_patterns("export", "report"))
    path = run / "eval" / "metrics.json"
    metrics = json.loads(path.read_text())
    assert metrics["seal"] == load_trained(RunDir(run), "latest").seal
    step = metrics["step"]
    for of, seal, told in (
        (step, metrics["seal"], None),
        (step, "0" * 64, f"another checkpoint, also of step {step};"),
        (step + 1, "0" * 64, f"step {step + 1}; the weights shown are of step {step}."),
    ):
        path.unlink()  # a link to the file that other tests read
        path.write_text(json.dumps({**metrics, "seal": seal, "step": of}))
        assert run_pipeline.main(["--stage", "report", "--run", str(run)]) == 0
        text = (run / "report" / "index.html").read_text()
        assert ("Accuracies are" in text) == (told is not None)
        assert told is None or f"Accuracies are those of {told}" in text
    shutil.rmtree(run)


def test_damaged_evaluation_is_refused(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, copy_function=os.link, ignore=shutil.ignore_patterns("export", "report"))
    path = run / "eval" / "predictions.npz"
    whole = path.read_bytes()
    path.unlink()
    trained = load_trained(RunDir(trained_run), "latest")
    flipped = bytes(byte ^ 255 if 60 < place < 90 else byte for place, byte in enumerate(whole))
    for damaged in (b"", b"PK", whole[: len(whole) // 2], whole[:-1], flipped, b"\x80\x04\x95pickle", bytes(200)):
        path.write_bytes(damaged)
        with pytest.raises(PipelineError, match="--stage eval"):
            facts.read_facts(RunDir(run), trained)
    with np.load(trained_run / "eval" / "predictions.npz") as file:
        arrays = {name: file[name] for name in file.files}
    for name in arrays:
        np.savez(path, **{**arrays, name: arrays[name][1:]})
        with pytest.raises(PipelineError, match="do not fit together"):
            facts.read_facts(RunDir(run), trained)
    odd = arrays["top"].copy()
    odd[0, 0] = 5
    labels = arrays["labels"]
    for change in ({"top": odd}, {"labels": labels.astype(np.float64)}, {"labels": np.stack([labels] * 2, axis=1)}):
        np.savez(path, **{**arrays, **change})
        assert run_pipeline.main(["--stage", "report", "--run", str(run)]) == 1
        assert "do not fit together" in capsys.readouterr().err
    shutil.rmtree(run)


def test_an_evaluation_of_two_classes_is_read_and_one_of_other_pictures_is_not(tmp_path: Path) -> None:
    folder, evaluation = tmp_path / "eval", {"images": 3, "loss": 1.0, "top1": 1.0, "top5": 1.0, "views": 1, "step": 1}
    folder.mkdir()
    two = {"top": [[0, 1]] * 3, "probability": [[0.7, 0.3]] * 3, "labels": [0] * 3, "loss": [1.0] * 3}
    np.savez(folder / "predictions.npz", **{name: np.array(value) for name, value in two.items()})
    (folder / "metrics.json").write_text(json.dumps(evaluation))
    assert facts._evaluation(RunDir(tmp_path), 2)[0] == evaluation
    (folder / "metrics.json").write_text(json.dumps({**evaluation, "images": 4}))
    with pytest.raises(PipelineError, match="do not fit together"):
        facts._evaluation(RunDir(tmp_path), 2)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium; skips without it, fails without it where CI is set (.ci/run installs it)."""
    if absent := missing():
        message = f"not installed: {', '.join(absent)} (apt-get install chromium chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with chromium() as window:
        yield window


def column(browser: Browser, table: str, number: int) -> list[str]:
    return browser.run(
        "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].map((row) => row.cells[arguments[1]])"
        ".map((cell) => cell.dataset.value ?? cell.textContent)",
        table,
        number,
    )


@pytest.mark.parametrize("width", [375, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_page_in_a_browser(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.messages() == []
    assert browser.run("return document.documentElement.scrollWidth") <= width
    colour = browser.run("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", colour)[:3]))
    assert brightness < 200 if dark else brightness > 600
    plots = browser.run(
        "return [...document.querySelectorAll('.plot')]"
        ".map((plot) => [plot.querySelectorAll('path, circle').length, plot.clientWidth])"
    )
    assert len(plots) == 4
    assert all(drawn >= 1 and 200 < wide <= width for drawn, wide in plots)
    broken = "return [...document.images].filter((i) => !i.complete || !i.naturalWidth).length"
    assert browser.run(broken) == 0


def test_sorting_switching_and_hovering(browser: Browser, page: Path) -> None:
    browser.open(page)

    names = column(browser, "classes", 0)
    browser.click("#classes th:nth-child(3) button")
    down = [float(v) for v in column(browser, "classes", 2)]
    assert down == sorted(down, reverse=True)
    browser.click("#classes th:nth-child(3) button")
    assert [float(v) for v in column(browser, "classes", 2)] == sorted(down)
    browser.click("#classes th:nth-child(1) button")
    assert column(browser, "classes", 0) == sorted(names)
    head = browser.run("return document.querySelector('#classes th').getAttribute('aria-sort')")
    assert head == "ascending"

    path = "return document.querySelector('[data-chart=loss] path.line').getAttribute('d')"
    linear = browser.run(path)
    browser.click("[data-chart=loss] [data-scale=log]")
    assert browser.run(path) != linear
    browser.click("[data-chart=loss] [data-scale=linear]")
    assert browser.run(path) == linear
    browser.click("[data-chart=loss] .legend button")
    assert browser.run("return document.querySelectorAll('[data-chart=loss] path.line').length") == 0
    browser.click("[data-chart=loss] .legend button")

    visible = "return [...document.querySelectorAll('[data-part^=maps]')].map((e) => e.offsetHeight > 0)"
    assert browser.run(visible) == [True, False, False][: len(browser.run(visible))]
    browser.click("[data-show='maps:2']")
    assert browser.run(visible)[:2] == [False, True]

    tip = browser.run(
        "const svg = document.querySelector('[data-chart=loss] svg'), box = svg.getBoundingClientRect();"
        "svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 20, clientY: box.top + 80}));"
        "const tip = document.querySelector('[data-chart=loss] .tip'); return [tip.hidden, tip.textContent]"
    )
    assert tip[0] is False
    assert re.match(r"epoch 2● training [\d.]+● validation [\d.]+", tip[1])

    background = "return getComputedStyle(document.body).backgroundColor"
    before = browser.run(background)
    browser.click("#theme")
    assert browser.run(background) != before
    browser.click("#theme")
    assert browser.run(background) == before
    assert browser.messages() == []


def test_two_runs_side_by_side(browser: Browser, trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "second"
    shutil.copytree(trained_run, run, copy_function=os.link, ignore=shutil.ignore_patterns("export", "report", "eval"))
    assert run_pipeline.main(["--stage", "report", "--run", str(run), "--compare", str(trained_run)]) == 0
    browser.open(run / "report" / "compare.html", width=375)
    assert browser.messages() == []
    assert browser.run("return document.documentElement.scrollWidth") <= 375
    specs = json.loads(browser.run("return document.getElementById('charts').textContent"))
    assert {s["name"] for s in specs["loss"]["series"] if s["style"] == "line"} == {"second: training", "run: training"}
    assert browser.run("return document.querySelectorAll('img.pixels').length") == 2
    assert (run / "report" / "compare.png").exists()
    shutil.rmtree(run)
