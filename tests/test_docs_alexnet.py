"""docs/alexnet.md says what the code does: its table, its figures, its links and its example."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from net.alexnet import alexnet, table
from net.layers import Conv, Linear
from net.network import parameter_shapes

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
        f"{parameters + grouped:,} parameters",  # a second half of each grouped layer's weights
        f"ln(1000) = {np.log(1000):.3f}",
        f"{0.1 * 121.78:.0f} grey levels with the root, and of {0.1 * 121.78**2:,.0f} with the eigenvalue",
        f"gives {0.1 * (121.78 / 255) ** 2 * 255:.1f} grey levels",
    ):
        assert phrase in text, phrase


_GROUPED = ("conv2.w", "conv4.w", "conv5.w")


def test_every_link_to_a_file_leads_to_one():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert len(links) > 10
    for link in links:
        assert (PAGE.parent / link).resolve().is_file(), link


def test_every_operation_of_the_textbook_is_pointed_at():
    files = {p.name for p in (PAGE.parent.parent / "net" / "reference").glob("[!_]*.py")}
    # Arrays are moved, not computed; the second normalisation belongs to the authors' code, not to the paper.
    assert {name for name in files if f"net/reference/{name}" not in TEXT} <= {"arrays.py", "map_norm.py"}


def test_the_example_runs(capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    exec(compile(example, str(PAGE), "exec"), {"__name__": "example"})  # noqa: S102
    lines = capsys.readouterr().out.splitlines()
    difference = {line.split()[0]: line.split()[-1] for line in lines[:8]}
    assert list(difference) == list(_inputs())
    text = " ".join(TEXT.split())
    assert f"differ by {difference['conv1']} of their size, at that of fc6 by {difference['fc6']}." in text
    assert [line.split()[0] for line in lines[8:10]] == ["fc8.w", "fc8.b"]
    assert len(lines) == 8 + 17
    gradients = [float(line.split()[-1]) for line in lines if ".w" in line]
    assert gradients == sorted(gradients, reverse=True)


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
