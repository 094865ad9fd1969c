"""docs/architecture.md is true: its picture is new, its examples run, what it names exists."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import linecache
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs/architecture.md"
TEXT = DOCUMENT.read_text()
RUN = "Run: python docs/draw_architecture.py"
# A Python example, and the output that the document shows for it, if it does.
EXAMPLES = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", TEXT, re.DOTALL)


def drawer() -> Any:
    """The script that draws the picture, as a module."""
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs/draw_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_what_the_imports_say() -> None:
    draw = drawer()
    assert draw.SVG.read_text() == draw.Picture().draw(), f"docs/architecture.svg is stale. {RUN}"


def test_the_table_of_floors_is_what_the_docstrings_say() -> None:
    assert drawer().document(TEXT) == TEXT, f"the table of docs/architecture.md is stale. {RUN}"


def test_every_package_is_in_the_picture_inside_of_the_page() -> None:
    draw = drawer()
    picture = draw.Picture()
    assert {p.parent.name for p in draw.LIBRARY.glob("*/__init__.py")} < set(picture.boxes)
    assert all(box.x + draw.BOX < draw.WIDTH for box in picture.boxes.values())
    for a, b in picture.edges:
        assert all(0 < x < draw.WIDTH for x, _ in picture.way(a, b)), f"{a} to {b} leaves the page"
    ET.parse(draw.SVG)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs_and_prints_what_the_document_shows(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, shown = EXAMPLES[number]
    monkeypatch.chdir(tmp_path)
    lines = code.splitlines(keepends=True)
    monkeypatch.setitem(linecache.cache, "example.py", (len(code), None, lines, "example.py"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "example.py", "exec"), {"__name__": "example"})
    if shown:
        output = printed.getvalue()
        same = output.split() == shown.split()  # the document breaks long lines
        assert same, f"docs/architecture.md shows another output. Put this there:\n\n{output}"


def test_there_are_examples_with_and_without_output() -> None:
    assert {bool(shown) for _, shown in EXAMPLES} == {True, False}


@pytest.mark.parametrize("document", ["architecture", "guarantees"])
def test_every_named_test_and_file_is_there(document: str) -> None:
    path = DOCUMENT.with_stem(document)
    text = path.read_text()
    links = re.findall(r"\[([^]]+)\]\(([^)#:]+)\)", text)
    assert sum(name.startswith("test_") for name, _ in links) > 20
    for name, target in links:
        assert (path.parent / target).is_file(), f"no file {target}"
        if name.startswith("test_"):
            content = (path.parent / target).read_text()
            assert f"def {name}(" in content, f"no test {name} in {target}"
    for name in re.findall(r"`(tests/[\w/.]+)`", text):
        assert (ROOT / name).exists(), f"no {name}"


def test_every_make_target_that_tests_something_is_named_and_no_other() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"`make ([\w-]+)`", TEXT))
    parts = {"compat-oldest", "compat-newest"}
    assert named == targets - parts - {"quickstart", "clean"}
