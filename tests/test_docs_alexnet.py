"""docs/alexnet.md says what the code does: its tables, figures, drawings, links and examples."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from net import reference
from net.alexnet import alexnet, table
from net.layers import Conv, Linear, MaxPool, Run
from net.network import forward, initial_parameters, parameter_shapes

PAGE = Path(__file__).parent.parent / "docs" / "alexnet.md"
TEXT = PAGE.read_text(encoding="utf-8")


def _sides(shape):
    return " x ".join(map(str, shape))


def _inputs():
    """Input shape of each layer with weights, by name."""
    shape, inputs = (227, 227, 3), {}
    for layer in alexnet(1000):
        if isinstance(layer, Conv | Linear):
            inputs[layer.name] = shape
        shape = layer.output_shape(shape)
    return inputs


def test_the_table_of_layers_is_the_networks():
    lines = re.findall(r"^\| (?:conv|fc|all).*\|$", TEXT.partition("Multiply-adds are")[0], flags=re.MULTILINE)
    written = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    layers = alexnet(1000)
    rows, shapes, inputs = table(layers), parameter_shapes(layers, (227, 227, 3)), _inputs()
    expected = [
        [
            row.name,
            _sides(inputs[row.name]),
            _sides(shapes[f"{row.name}.w"]),
            _sides(row.output),
            f"{row.parameters:,}",
            f"{row.multiply_adds:,}",
        ]
        for row in rows
    ]
    total = [f"{sum(r.parameters for r in rows):,}", f"{sum(r.multiply_adds for r in rows):,}"]
    assert written == [*expected, ["all", "", "", "", *total]]


def test_parameters_and_multiply_adds_are_those_of_the_arrays():
    """The table's figures from nothing but the shapes of weights and outputs."""
    layers = alexnet(1000)
    shapes = parameter_shapes(layers, (227, 227, 3))
    for row in table(layers):
        w, b = shapes[f"{row.name}.w"], shapes[f"{row.name}.b"]
        assert row.parameters == np.prod(w) + np.prod(b)
        # Each output number is a sum of as many products as its kernel has weights.
        assert row.multiply_adds == np.prod(row.output) * np.prod(w[:-1])


def test_the_figures_in_the_text():
    rows = {row.name: row for row in table(alexnet(1000))}
    parameters = sum(r.parameters for r in rows.values())
    operations = sum(r.multiply_adds for r in rows.values())
    convolutions = [r for name, r in rows.items() if name.startswith("conv")]
    grouped = sum(np.prod(s) for n, s in parameter_shapes(alexnet(1000), (227, 227, 3)).items() if n in _GROUPED)
    text = " ".join(TEXT.split())
    for phrase in (
        f"hold {sum(r.parameters for r in convolutions) / parameters:.0%}".replace("%", " %"),
        f"do {sum(r.multiply_adds for r in convolutions) / operations:.0%}".replace("%", " %"),
        f"holds {rows['fc6'].parameters / parameters:.0%}".replace("%", " %"),
        f"costs {(2 * operations - rows['conv1'].multiply_adds) / operations:.2f} times as much as the forward pass",
        f"{parameters + grouped:,} parameters",  # a second half of each grouped layer's weights
        f"ln(1000) = {np.log(1000):.3f}",
        f"{0.1 * 121.78:.0f} grey levels with the root, and of {0.1 * 121.78**2:,.0f} with the eigenvalue",
        f"gives {0.1 * (121.78 / 255) ** 2 * 255:.1f} grey levels",
    ):
        assert phrase in text, phrase


_GROUPED = ("conv2.w", "conv4.w", "conv5.w")


def test_every_operation_of_the_textbook_is_pointed_at():
    files = {p.name for p in (PAGE.parent.parent / "net" / "reference").glob("[!_]*.py")}
    # Arrays are moved, not computed; the second normalisation belongs to the authors' code, not to the paper.
    assert {name for name in files if f"net/reference/{name}" not in TEXT} <= {"arrays.py", "map_norm.py"}


def _example(mark: str) -> str:
    """The page's block of Python after this mark."""
    (text,) = re.findall(rf"<!-- {mark} -->\n```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    return text


def _run(text: str) -> dict[str, Any]:
    seen: dict[str, Any] = {"__name__": "example"}
    exec(compile(text, str(PAGE), "exec"), seen)  # noqa: S102
    return seen


def test_all_blocks_of_python_are_run_here():
    assert TEXT.count("```python") == len(re.findall(r"<!-- (?:gradient check|silent ReLUs|as at|one step)", TEXT)) == 4


def test_the_example_runs(capsys):
    example = _example("one step")
    _run(example)
    lines = capsys.readouterr().out.splitlines()
    difference = {line.split()[0]: line.split()[-1] for line in lines[:8]}
    assert list(difference) == list(_inputs())
    text = " ".join(TEXT.split())
    assert f"differ by {difference['conv1']} of their size, at that of fc6 by {difference['fc6']}." in text
    assert [line.split()[0] for line in lines[8:10]] == ["fc8.w", "fc8.b"]
    assert len(lines) == 8 + 17
    gradients = [float(line.split()[-1]) for line in lines if ".w" in line]
    assert gradients == sorted(gradients, reverse=True)

    before, after = "weight_std=(0.01,) * 8", "weight_std=(0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01)"
    assert f"`{after}`, the authors' start" in text
    assert example.count(before) == 1
    _run(example.replace(before, after))
    authors = capsys.readouterr().out.splitlines()
    (conv1,) = (float(line.split()[-1]) for line in authors if line.startswith("conv1.w"))
    assert f"it is {authors[5].split()[-1]} at fc6, and conv1's gradient is {conv1 / gradients[-1]:.0f} times" in text


def test_the_drawing_of_im2col():
    picture, kernel = np.arange(1.0, 10).reshape(1, 3, 3, 1), np.arange(1.0, 5).reshape(2, 2, 1, 1)
    windows = sliding_window_view(picture[0, :, :, 0], (2, 2)).reshape(4, 4)
    y = reference.conv2d_forward(picture, kernel, np.zeros(1), stride=1, pad=0, groups=1).ravel()
    drawn = TEXT.partition("a row for each position")[2].partition("```")[0]
    numbers = [[int(n) for n in re.findall(r"\d+", line)] for line in drawn.splitlines() if re.search(r"\d", line)]
    assert [row[:-6] for row in numbers] == [*picture[0, :, :, 0].tolist(), []]
    assert [row[-6:-2] for row in numbers] == windows.tolist()
    assert [row[-2] for row in numbers] == kernel.ravel().tolist()
    assert [row[-1] for row in numbers] == y.tolist()


def test_the_receptive_fields():
    sees, distance, rows = 1, 1, [[], []]
    for layer in alexnet(1000):
        if isinstance(layer, Conv | MaxPool):
            sees, distance = sees + (layer.size - 1) * distance, distance * layer.stride
            rows[0].append(sees)
            rows[1].append(distance)
    for name, numbers in zip(("sees, pixels each way", "distance to the next value, pixels"), rows, strict=True):
        assert f"| {name} | {' | '.join(map(str, numbers))} |" in TEXT
    assert f"has therefore seen {sees} of the 227 pixels" in TEXT


def test_a_pixel_outside_the_receptive_field_changes_nothing():
    """The table's 99 pixels of conv3, seen in the network itself, below and above the middle."""
    layers = alexnet(10)[:9]
    parameters = initial_parameters(parameter_shapes(layers, (227, 227, 3)), (0,) * 3, (0,) * 3, seed=0)
    x = np.random.default_rng(0).normal(0, 60, (1, 227, 227, 3)).astype(np.float32)
    y, tape = forward(reference, layers, parameters, x, Run(training=True))
    dy = np.zeros_like(y)
    dy[0, 6, 6] = 1
    for layer, kept in zip(reversed(layers), reversed(tape), strict=True):
        dy, _ = layer.backward(reference, parameters, dy, kept, need_dx=True)
    rows, columns = np.nonzero(np.abs(dy[0]).max(axis=-1))
    middle = 4 * (2 * (2 * 6 + 1) + 1) + 5  # of the field of value (6, 6)
    assert (rows.min(), rows.max()) == (columns.min(), columns.max()) == (middle - 49, middle + 49)


def test_the_check_of_a_gradient(capsys):
    seen = _run(_example("gradient check"))
    off = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    right, broken, right_of_paper, broken_of_paper = off
    assert max(right, right_of_paper) < 1e-9  # "4e-11 both times", but for the rounding of other libraries
    text = " ".join(TEXT.split())
    assert f"the broken one by {broken:.0e} with alpha = 1" in text
    assert f"the broken one is off by {broken_of_paper:.0e} only" in text

    # "Three things to try"
    differences, dy = seen["differences"], np.array([3.0, -4.0])
    zero = np.zeros(2)
    np.testing.assert_allclose(differences(lambda x: (dy * reference.relu_forward(x)).sum(), zero), dy / 2)
    assert (reference.relu_backward(dy, reference.relu_forward(zero)) == 0).all()

    flat = np.ones((1, 3, 3, 1))
    pooled = differences(lambda x: 2 * reference.maxpool_forward(x, size=3, stride=2)[0].sum(), flat)
    np.testing.assert_allclose(pooled, 1.0)

    z, labels = np.random.default_rng(0).standard_normal((4, 5)), np.arange(4)
    slopes = differences(lambda z: reference.cross_entropy(z, labels)[0].mean(), z)
    np.testing.assert_allclose(slopes, reference.cross_entropy(z, labels)[1], atol=1e-9)


def test_looking_into_a_trained_network(trained_run: Path, capsys):
    text = _example("silent ReLUs").replace("runs/default", str(trained_run))
    _run(text)
    trained = capsys.readouterr().out.splitlines()
    names = [line.partition(":")[0] for line in trained]
    assert names == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"]
    assert [line.split()[-2] for line in trained] == ["96", "256", "384", "384", "256", "250", "250"]

    line = "parameters = trained.on_device(ops)\n"
    assert text.count(line) == 1
    seen = _run(text.replace(line, _example("as at the start")))
    start, end = seen["parameters"]["fc6.w"], seen["trained"].parameters["fc6.w"]
    assert np.corrcoef(start.ravel(), end.ravel())[0, 1] > 0.9  # this run's start, not just any
    start = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in start] == names
    assert start != trained


OPERATIONS = sorted(
    path.stem
    for path in (PAGE.parent.parent / "net" / "reference").glob("[!_]*.py")
    if path.stem not in ("arrays", "philox")  # nothing is computed; not the paper's
)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_head_of_each_file_is_enough(name):
    """Formula, shapes, dtypes and the paper's section, without the code below it."""
    head = importlib.import_module(f"net.reference.{name}").__doc__
    assert "(paper, section" in head or ("Not in the paper" in head and name == "map_norm")
    assert "\nShapes\n" in head
    assert "float" in head
    assert "``" in head or "::" in head  # a formula


def test_the_walk_with_the_debugger(run: Path):
    """The lines of the page, typed into the page's command, on small pictures."""
    (lines,) = re.findall(r"<!-- debugger -->\n```\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"^python (-m pdb -- run_pipeline\.py .*)$", TEXT, flags=re.MULTILINE)
    typed = "".join(line.partition("#")[0].strip() + "\n" for line in lines.splitlines())
    arguments = shlex.split(command.replace("runs/debug", shlex.quote(str(run))))
    result = subprocess.run(
        [sys.executable, *arguments], cwd=PAGE.parents[1], input=typed, capture_output=True, text=True, timeout=120
    )
    said = result.stdout
    assert "***" not in said, said  # what pdb puts before an error
    assert "(2, 15, 15, 96)" in said
    assert "-> loss = self._step_function(epoch)(inputs)" in said
    assert "((2, 3, 3, 256), (3, 3, 192, 256)," in said
    assert "[(2, 3, 3, 384), (3, 3, 192, 256), (256,)]" in said
