"""A YAML text of anybody is plain data of bounded size, or an error of a few lines, at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import RecipeError
from surgery_recipes.recipe_files.plain_yaml import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_SIZE,
    parse_value,
    read_yaml,
    write_yaml,
)

PIECES = (
    *"[]{},:-?|>%@`'\"#\n\t ", "- ", ": ", "\n  ", "a", "&a ", "*a ", "&b ", "*b ", "<<: ",
    "!!int ", "!!bool ", "!!float ", "!!binary ", "!!timestamp ", "!!set ", "!!omap ", "!!pairs ",
    "!!null ", "!!python/name:os.system ", "!<x> ", "---\n", "...\n", "%YAML 1.1\n",
    "1e3", "0x1f", "1:30", ".inf", "null", "true", "2026-01-31", "\\ud800", "\0", "\u0085",
    "\ufeff", "9" * 5000,
)  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"]))
    | st.sampled_from(["no", "1e5", "1e-3", ".5e1", "2026-01-31", "0x1f", "1_000", "null", "<<"])
)
DATA = st.recursive(
    SCALARS,
    lambda below: st.lists(below) | st.dictionaries(st.text("ab<=~1e5"), below),
    max_leaves=9,
)


def parts(value: Any, depth: int = 1) -> Iterator[tuple[Any, int]]:
    yield value, depth
    inside = [*value, *value.values()] if isinstance(value, dict) else value
    for each in inside if isinstance(inside, list) else ():
        yield from parts(each, depth + 1)


def attempt(read: Callable[[Any], Any], source: Any) -> Any:
    """What is read, or the error's text, which is short."""
    try:
        return read(source)
    except RecipeError as error:
        told = str(error)
    assert len(told) < 800
    return told


def check(made: Any) -> None:
    """Check that data are plain, bounded, and share nothing."""
    found = list(parts(made))
    assert len(found) <= MAX_SIZE
    assert max(depth for _, depth in found) <= MAX_DEPTH
    kinds = {type(part) for part, _ in found}
    assert kinds <= {dict, list, str, int, float, bool, type(None)}
    inner = [id(part) for part, _ in found if isinstance(part, (dict, list))]
    assert len(inner) == len(set(inner))


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_any_pieces_of_yaml_are_plain_data_or_an_error(text: str) -> None:
    check(attempt(parse_value, text))


@given(st.text(max_size=300))
def test_any_text_is_plain_data_or_an_error(text: str) -> None:
    check(attempt(parse_value, text))


@given(DATA)
def test_plain_data_are_read_as_they_were_written(tmp_path: Path, content: Any) -> None:
    write_yaml(content, tmp_path / "x.yaml")
    assert read_yaml(tmp_path / "x.yaml") == content


@given(st.binary(max_size=200))
def test_any_bytes_are_plain_data_or_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.yaml").write_bytes(data)
    check(attempt(read_yaml, tmp_path / "x.yaml"))


NINES = "".join(f"- &a{i + 1} [{','.join([f'*a{i}'] * 9)}]\n" for i in range(8))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- &a0 [x]\n" + NINES, "counting what aliases repeat"),
        ("- &a0 {b: x}\n" + NINES.replace("[", "{<<: [").replace("]", "]}"), "aliases repeat"),
        ("- &a " + "x" * 6000 + "\n" + "- *a\n" * 20, "counting what aliases repeat"),
        ("[" * 3000 + "]" * 3000, "more than 32 levels"),
        ("\n".join(" " * i + "a:" for i in range(500)), "more than 32 levels"),
        ("a: &a [*a]", r"\*a repeats itself"),
        ("&a {b: {<<: *a}}", r"\*a repeats itself"),
        ("x" * (MAX_SIZE + 1), "more than 65,536 characters"),
        ("9" * 5000, "is not YAML for a recipe"),
        ("0x" + "f" * 5000, "more than 64 bits"),
        (":".join("1" * 5000), "more than 64 bits"),
        ("!!int x", "invalid literal"),
        ("!!bool maybe", "maybe"),
        ("!!timestamp x", "is not YAML for a recipe"),
        ("!!python/object/apply:os.system [exit]", "could not determine a constructor"),
        ("{1: 2}", "the key 1 is not a text"),
        ("{[1]: 2}", "unhashable"),
        ("!!binary aGk=", "is not a text, a number"),
        ('"\\0"', "control character"),
        ('"\\ud800"', "control character"),
        ("a: 1\n---\nb: 2", "another document"),
    ],
)  # fmt: skip
def test_what_would_cost_much_or_is_no_plain_data_is_refused_at_once(text: str, part: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(RecipeError, match=part) as told:
        parse_value(text)
    assert time.perf_counter() - begun < 3
    assert len(str(told.value)) < 600


def test_an_alias_is_a_copy() -> None:
    made = parse_value("a: &a {x: [1]}\nb: *a\nc: {<<: *a, y: 2}")
    assert made == {"a": {"x": [1]}, "b": {"x": [1]}, "c": {"x": [1], "y": 2}}
    made["a"]["x"].append(2)
    assert made["b"] == {"x": [1]}
    assert made["c"] == {"x": [1], "y": 2}


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "latin").write_bytes("a: é".encode("latin-1"))
    (tmp_path / "large").write_text("#" * (MAX_BYTES + 1))
    for name, part in {
        "fifo": "folder or a device",
        ".": "folder or a device",
        "latin": "this is not YAML",
        "large": "more than 262,144 bytes",
        "x" * 300: "cannot be read",
        "a\0b": "folder or a device",
    }.items():
        with pytest.raises(RecipeError, match=part):
            read_yaml(tmp_path / name)
