"""Configuration: recipes, overrides, and what is refused with which sentence."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config as c
from pipeline import config_values as v
from pipeline.errors import PipelineError
from stages.setup import network_layers


@pytest.mark.parametrize("name", c.RECIPES)
def test_recipe_survives_json(name: str) -> None:
    recipe = c.load_config(name)
    text = json.dumps(v.to_dict(recipe), allow_nan=False)
    assert v.from_dict(json.loads(text), "config.json") == recipe
    assert recipe.recipe == name


_STEPS = ((0, 0.01), (30, 0.001), (55, 0.0001), (75, 0.00001))
_BIAS = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)  # the paper's: 1 in conv2, conv4, conv5, fc6 and fc7

# Every number in which the recipes differ, typed a second time, from the sources and not from pipeline/config.py.
PUBLISHED = {
    # key: seed, paper, original, caffe
    "input.crop": (224, 224, 224, 227),
    "input.border": ((2, 1), (2, 1), (0, 3), (0, 0)),
    "input.scale": (1 / 255, 1.0, 1.0, 1.0),
    "input.mean": ("none", "image", "center", "image"),
    "input.bgr": (False, False, False, True),
    "input.jitter": (0.1, 0.1, 0.1, 0.0),
    "input.jitter_epochs": (None, None, 67, None),
    "input.jitter_rescale": (False, False, True, False),
    "network.lrn_size": (4, 5, 5, 5),
    "network.lrn_k": (2.0, 2.0, 2.0, 1.0),
    "network.lrn_alpha_over_n": (False, False, True, True),
    "network.relu_before_lrn": (True, True, False, True),
    "network.map_norm": (False, False, True, False),
    "network.final_relu": (True, False, False, False),
    "network.dropout_scale_in_training": (False, False, False, True),
    "network.weight_std": (
        (0.0,) * 7 + (0.01,),
        (0.01,) * 8,
        (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01),
        (0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01),
    ),
    "network.bias": (
        (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),  # fc8: or the last ReLU dies
        _BIAS,
        _BIAS,
        (0.0, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.0),
    ),
    "train.batch_size": (128, 128, 128, 256),
    "train.epochs": (90, 90, 91, 72),
    "train.lr": (
        _STEPS,
        _STEPS,
        ((0, 0.01), (25, 0.001), (51, 0.0001), (79, 0.00001)),
        ((0, 0.01), (20, 0.001), (40, 0.0001), (60, 0.00001)),
    ),
    "train.bias_lr": ((), (), ((0, 0.02),), ()),
    "train.bias_lr_factor": (1.0, 1.0, 1.0, 2.0),
    "train.conv1_lr": ((), (), ((67, 0.00001), (72, 0.0)), ()),
    "train.bias_decay": (True, True, False, False),
    "eval.batch_size": (256, 256, 128, 256),
    "eval.views": (1, 1, 10, 1),
}
ALIKE = {
    "input.random_crop": True,
    "input.flip": True,
    "network.lrn_alpha": 1e-4,
    "network.lrn_beta": 0.75,
    "network.pool_size": 3,
    "network.pool_stride": 2,
    "network.fc_units": 4096,
    "network.dropout_keep": 0.5,
    "train.momentum": 0.9,
    "train.weight_decay": 5e-4,
}


@pytest.mark.parametrize("key", [*PUBLISHED, *ALIKE])
def test_recipes_hold_the_published_numbers(key: str) -> None:
    held = tuple(dict(_flat(dataclasses.asdict(c.RECIPES[n])))[key] for n in ("seed", "paper", "original", "caffe"))
    assert held == PUBLISHED.get(key, (ALIKE.get(key),) * 4)


def test_what_recipes_differ_in_is_published() -> None:
    """A number that comes to differ between recipes belongs into the table above."""
    seed, *others = (dict(_flat(dataclasses.asdict(c.RECIPES[n]))) for n in ("seed", "paper", "original", "caffe"))
    assert {key for other in others for key in seed if seed[key] != other[key]} == {"recipe", *PUBLISHED}


def test_every_key_can_be_set_to_its_own_value() -> None:
    values = dict(_flat(dataclasses.asdict(c.ORIGINAL)))
    del values["recipe"]
    assert sorted(values) == sorted(v.keys())
    for key, value in values.items():
        text = "none" if value is None else json.dumps(value)
        assert v.changes(settings=[f"{key}={text}"])(c.ORIGINAL) == c.ORIGINAL, key


def test_every_type_has_words_for_people() -> None:
    """A value of no type is refused for each key, with a sentence that names no Python type."""
    names = v.keys()
    for key in names:
        with pytest.raises(PipelineError, match=rf"{key} takes (a|two|true|pairs)") as caught:
            v.changes(settings=[f"{key}=2024-01-01"])(c.SEED)
        assert not re.search(r"\b(tuple|int|float|bool|str)\b", str(caught.value))


def test_set_changes_exactly_one_field() -> None:
    changed = v.changes(settings=["train.batch_size=7", "network.lrn_beta=1", "input.mean=image"], seed=3)(c.SEED)
    expected = dataclasses.replace(
        c.SEED,
        seed=3,
        train=dataclasses.replace(c.SEED.train, batch_size=7),
        network=dataclasses.replace(c.SEED.network, lrn_beta=1.0),
        input=dataclasses.replace(c.SEED.input, mean="image"),
    )
    assert changed == expected
    assert isinstance(changed.network.lrn_beta, float)
    assert v.difference(c.SEED, changed) == [
        "seed (0 there, 3 here)",
        "input.mean (none there, image here)",
        "network.lrn_beta (0.75 there, 1.0 here)",
        "train.batch_size (128 there, 7 here)",
    ]


def test_what_differs_is_told_as_it_is_typed() -> None:
    typed = ["input.border=[0, 3]", "input.flip=false", "train.weights=/a b", "train.lr=[[0, 0.1]]"]
    said = v.difference(c.SEED, v.changes(settings=typed)(c.SEED))
    assert [text.partition(" there, ")[2] for text in said] == [f"{one.partition('=')[2]} here)" for one in typed]
    assert said[0] == "input.border ([2, 1] there, [0, 3] here)"
    assert said[2].startswith("train.weights (none there")


def test_none_and_schedules_can_be_set() -> None:
    changed = v.changes(settings=["input.jitter_epochs=none", "train.lr=[[0, 1], [2, 0.5]]"])(c.ORIGINAL)
    assert changed.input.jitter_epochs is None
    assert changed.train.lr == ((0, 1.0), (2, 0.5))
    one = v.changes(settings=["train.lr=0.5", "train.bias_lr=1"])(c.ORIGINAL).train
    assert (one.lr, one.bias_lr) == (((0, 0.5),), ((0, 1.0),))


@pytest.mark.parametrize(
    ("setting", "pattern"),
    [
        ("train.batchsize=4", r"no configuration key 'train.batchsize' \(did you mean train.batch_size\?\)"),
        ("batch_size=4", r"no configuration key 'batch_size'"),
        (
            "foo=3",
            r"^--set foo=3: there is no configuration key 'foo'; pipeline/config\.py lists all: .{,70}$",
        ),
        ("train=4", r"no configuration key 'train'"),
        ("seed.x=4", r"no configuration key 'seed.x'"),
        ("=4", r"no configuration key ''"),
        ("train.batch_size", r"has no '='.*--set key=value"),
        ("train.batch_size=four", r"train.batch_size takes a whole number, not 'four'"),
        ("train.batch_size=4.0", r"train.batch_size takes a whole number, not 4.0"),
        ("train.batch_size=true", r"train.batch_size takes a whole number, not True"),
        ("train.momentum=true", r"train.momentum takes a number"),
        ("input.flip=1", r"input.flip takes true or false, not 1"),
        ("input.mean=3", r"input.mean takes a word, not 3"),
        ("input.border=[1]", r"input.border takes two whole numbers such as"),
        ("input.border=[1, 2, 3]", r"input.border takes two whole numbers such as"),
        ("network.weight_std=0.1", r"network.weight_std takes a list of numbers such as"),
        ("network.weight_std=[0.1, 'x']", r"network.weight_std takes a number"),
        ("train.lr=[[0]]", r"train.lr takes pairs of a first epoch and a value"),
        (
            "train.lr=fast",
            r"train.lr takes a number, or a list of first epochs and values such as "
            r"\[\[0, 0.01\], \[30, 0.001\]\], not 'fast'",
        ),
        ("input.jitter_epochs=x", r"input.jitter_epochs takes a whole number or none, not 'x'"),
        ("seed=2024-01-01", r"seed takes a whole number"),
        ("train.batch_size=none", r"train.batch_size takes a whole number, not 'none'"),
        ("input.scale=nan", r"input.scale .*finite"),
        ("train.lr=[[0, inf]]", r"train.lr .*finite"),
        ("train.lr=inf", r"train.lr .*finite"),
        ("train.weight_decay=1e39", r"train.weight_decay .*finite"),
        pytest.param(f"train.batch_size=1{'0' * 5000}", r"a whole number, not", id="more digits than Python reads"),
        pytest.param(f"train.lr={'[' * 5000}", r"train.lr takes a number, or a list", id="nested too deep"),
        (f"train.weight_decay=1{'0' * 400}", r"train.weight_decay .*finite"),
    ],
)
def test_wrong_settings_are_refused(setting: str, pattern: str) -> None:
    with pytest.raises(PipelineError, match=pattern) as caught:
        v.changes(settings=[setting])(c.SEED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        "seed=-1",
        "preprocess.size=200",
        "preprocess.size=5000",
        "preprocess.filter=cubic",
        "preprocess.shard_images=0",
        "input.crop=0",
        "input.crop=59",
        "input.border=[-1, 0]",
        "input.border=[0, 5000]",
        "input.mean=all",
        "input.jitter=-0.1",
        "train.lr=[[0, -0.01]]",
        "train.bias_lr=[[0, -0.01]]",
        "train.bias_lr_factor=-1",
        "network.lrn_alpha=-1",
        "network.weight_std=[0.1]",
        "network.weight_std=[0,0,0,0,0,0,0,-1]",
        "network.bias=[0]",
        "network.dropout_keep=0",
        "network.dropout_keep=1.5",
        "network.lrn_size=-1",
        "network.fc_units=0",
        "network.lrn_k=0",
        "network.pool_stride=4",
        "network.pool_size=6",
        "train.batch_size=0",
        "eval.batch_size=0",
        "eval.views=2",
        "train.epochs=0",
        "train.lr=[]",
        "train.lr=[[1, 0.1]]",
        "train.lr=[[0, 0.1], [5, 0.01], [3, 0.02]]",
        "train.bias_lr=[[5, 0.01], [5, 0.02]]",
        "train.conv1_lr=[[-1, 0.01]]",
        "train.momentum=1",
        "train.weight_decay=-1",
        "train.checkpoint_every=0",
        "train.save_every=0",
        "train.validate_every=0",
        "train.log_every=0",
        "train.keep_checkpoints=0",
        "loader.slots=1",
        "loader.threads=0",
    ],
)
def test_values_out_of_range_are_refused(setting: str) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(PipelineError, match=re.escape(key)):
        v.changes(settings=[setting])(c.SEED)


@pytest.mark.parametrize(("pool", "least"), [((3, 2), 67), ((2, 2), 39), ((3, 1), 35), ((4, 3), 167)])
def test_the_least_input_is_the_one_that_leaves_a_pixel(pool: tuple[int, int], least: int) -> None:
    size, stride = pool
    pools = [f"network.pool_size={size}", f"network.pool_stride={stride}", "input.border=[0, 0]"]
    config = v.changes(settings=[*pools, f"input.crop={least}"])(c.SEED)
    layers = network_layers(config, classes=10)
    shapes = [(least, least, 3)]
    for layer in layers:
        shapes.append(layer.output_shape(shapes[-1]))
    assert min(min(shape) for shape in shapes) == 1
    with pytest.raises(PipelineError, match=rf"input\.crop plus input\.border must be at least {least}, or nothing"):
        v.changes(settings=[*pools, f"input.crop={least - 1}"])(c.SEED)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(PipelineError, match=r"no recipe 'orignal' \(did you mean original\?\)"):
        c.load_config("orignal")


def test_toml_file_then_settings_then_seed(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('seed = 5\n[train]\nbatch_size = 4\nlr = [[0, 0.5]]\n[input]\nmean = "center"\n')
    changed = v.changes(file, ["train.batch_size=8"], seed=6)(c.SEED)
    assert (changed.seed, changed.train.batch_size, changed.train.lr) == (6, 8, ((0, 0.5),))
    assert changed.input.mean == "center"
    assert v.changes(file, seed=0)(c.SEED).seed == 0


def test_toml_may_begin_with_the_mark_that_some_editors_write(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(b"\xef\xbb\xbf[train]\r\nbatch_size = 4\r\n")
    assert v.changes(file)(c.SEED).train.batch_size == 4


def test_one_setting_sets_one_key() -> None:
    with pytest.raises(PipelineError, match=r"train.batch_size takes a whole number"):
        v.changes(settings=["train.batch_size=4\ntrain.epochs=1"])(c.SEED)


@pytest.mark.parametrize(
    ("setting", "pattern"),
    [
        ("train.plateau_steps=0", "train.plateau_steps must be at least 1"),
        ("input.scale=0", "input.scale must be a positive number that float32 can hold"),
        ("input.scale=-1", "input.scale must be a positive number"),
        ("input.scale=1e-50", "input.scale must be a positive number"),  # 0 in float32
        ("input.jitter=1e30", "input.jitter must lie between 0 and 10"),
        ("input.jitter_epochs=-1", "input.jitter_epochs must not be negative"),
        ("network.lrn_size=1000000", "network.lrn_size must lie between 0 and 512"),  # a step would take minutes
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: str, pattern: str) -> None:
    with pytest.raises(PipelineError, match=pattern):
        v.changes(settings=[setting])(c.SEED)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (b"[train\n", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
        (b"seed = " + b"9" * 5000, "not valid TOML"),
        (b"seed = " + b"[" * 5000, "not valid TOML"),
        (b"[train]\nbatch_sise = 4\n", r"did you mean train.batch_size\?"),
        (b"[train]\nbatch_size = 'x'\n", "takes a whole number"),
        (b"[train]\nbatch_size = 0\n", "train.batch_size must lie between 1 and 65536"),
    ],
)
def test_bad_toml_is_refused_by_name(tmp_path: Path, text: bytes, pattern: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(text)
    with pytest.raises(PipelineError, match=pattern) as caught:
        v.changes(file)(c.SEED)
    assert str(file) in str(caught.value)


def test_missing_toml_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"cannot read the configuration file .*none\.toml"):
        v.changes(tmp_path / "none.toml")(c.SEED)


def test_at_epoch_holds_until_the_next_entry() -> None:
    schedule = ((0, 1.0), (3, 0.5), (7, 0.25))
    assert [c.at_epoch(schedule, e) for e in (0, 2, 3, 6, 7, 100)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert c.at_epoch(((2, 1.0),), 1) is None
    assert c.at_epoch((), 0) is None


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from([*v.keys(), "recipe", "train", "x.y"]), value=_json)
def test_any_value_for_any_key_is_taken_or_refused_plainly(key: str, value: object) -> None:
    values = v.to_dict(c.DEMO)
    section = values
    *path, last = key.split(".")
    for name in path:
        section = section.setdefault(name, {})
    section[last] = value
    try:
        config = v.from_dict(values, "config.json")
    except PipelineError:
        return
    json.dumps(v.to_dict(config), allow_nan=False)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(max_size=30) | st.sampled_from(v.keys()).flatmap(lambda k: st.text(max_size=12).map(f"{k}=".__add__))
)
def test_any_setting_is_taken_or_refused_plainly(text: str) -> None:
    try:
        config = v.changes(settings=[text])(c.DEMO)
    except PipelineError:
        return
    json.dumps(v.to_dict(config), allow_nan=False)


def _flat(values: dict, prefix: str = "") -> list[tuple[str, object]]:
    flat = []
    for key, value in values.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return flat


def test_a_recipe_is_not_a_setting(tmp_path: Path) -> None:
    """It would change the label and none of the numbers."""
    toml = tmp_path / "mine.toml"
    toml.write_text('recipe = "original"\n')
    for how in ({"settings": ["recipe=original"]}, {"settings": [" recipe = original"]}, {"toml": toml}):
        with pytest.raises(PipelineError, match="name it with --recipe"):
            v.changes(**how)(c.SEED)


def test_a_saved_configuration_that_cannot_work_is_refused_by_its_files_name() -> None:
    saved = v.to_dict(c.SEED)
    saved["eval"]["views"] = 3
    with pytest.raises(PipelineError, match=r"^config\.json: eval\.views must be 1 or 10"):
        v.from_dict(saved, "config.json")


def test_a_file_of_changes_is_read_once(tmp_path: Path) -> None:
    """It may be a pipe, and several configurations are changed by it."""
    toml = tmp_path / "mine.toml"
    toml.write_text("seed = 4\n")
    change = v.changes(toml, ["train.batch_size=3"])
    toml.unlink()
    for recipe in (c.SEED, c.DEMO):
        changed = change(recipe)
        assert (changed.recipe, changed.seed, changed.train.batch_size) == (recipe.recipe, 4, 3)
