"""Every link of README.md and docs/ leads to a file, and to a heading where it names one; commands named exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import bench
from net.weights.onnx_graph import OPSET

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The names GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_that_is_to_be_run_is_there(page: Path) -> None:
    for name in re.findall(r"(?:python\s+-m\s+|`)((?:bench|tests)(?:\.\w+)+)[\s`]", page.read_text(encoding="utf-8")):
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


def test_the_benchmarks_are_listed() -> None:
    """``bench/__init__.py`` says what each file is for."""
    folder = ROOT / "bench"
    names = {path.stem for path in folder.glob("[!_]*.py")} | {
        path.parent.name for path in folder.glob("*/__main__.py")
    }
    commands = set(re.findall(r"^    (\w+)  ", bench.__doc__ or "", flags=re.MULTILINE))
    parts = set(re.findall(r"``(\w+)``", bench.__doc__ or ""))
    assert commands <= names <= commands | parts


def test_the_operator_set_is_the_one_that_is_exported() -> None:
    assert f"Operator set {OPSET}." in (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
