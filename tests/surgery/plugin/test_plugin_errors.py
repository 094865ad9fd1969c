"""Wrong plugins: each is told what is wrong with it, where, and what to write instead."""

from __future__ import annotations

import sys
import types
import warnings
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.plugin import plugin_errors
from surgery.plugin.registry import Registry
from tests.support.entry_points import plugin, point
from tests.support.models import build

GOOD = """
from dataclasses import dataclass
import surgery

@dataclass(frozen=True)
class Good(surgery.Method):
    name = "good"
"""
REGISTER = """
@surgery.hookimpl
def register_methods(register):
    register({})
"""


def told(
    name: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tail: str = ""
) -> str:
    """Load a plugin with this text and return the one warning that tells of it."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    made = Registry()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.load([point("x", name + tail)])
    [warning] = [w for w in caught if w.category is RuntimeWarning]
    assert not made.methods()
    return str(warning.message)


def test_an_exception_at_import_is_told_with_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import surgery\n\nRANK = 4 / 0\n"
    assert told("wrong_import", text, tmp_path, monkeypatch) == (
        "plugin 'x' (wrong_import) could not be loaded: ZeroDivisionError: division by zero "
        f"({tmp_path / 'wrong_import.py'}, line 3). The other plugins are there."
    )
    text = "import surgery\ndef splice(:\n"
    said = told("wrong_syntax", text, tmp_path, monkeypatch)
    assert f"({tmp_path / 'wrong_syntax.py'}, line 2). The other" in said


def test_a_forgotten_dataclass_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = GOOD.replace("@dataclass(frozen=True)", "") + "    rank: int = 4\n"
    said = told("wrong_class", text + REGISTER.format("Good"), tmp_path, monkeypatch)
    assert said == (
        "plugin 'x' (wrong_class) could not be loaded: MethodError: plugin 'x' offers <class "
        "'wrong_class.Good'>, which is not a dataclass: its option 'rank' could not be set or "
        "saved. Write @dataclass(frozen=True) above the class "
        f"({tmp_path / 'wrong_class.py'}, line 8). The other plugins are there."
    ).replace(f" ({tmp_path / 'wrong_class.py'}, line 8)", "")

    class Mine(surgery.Method):
        name = "mine"
        rank: int = 4

    for make in (Mine, lambda: Mine(rank=3)):  # type: ignore[call-arg]
        with pytest.raises(surgery.MethodError) as error:
            make()
        assert str(error.value) == (
            "Mine is not a dataclass: its option 'rank' could not be set or saved. Write "
            "@dataclass(frozen=True) above the class."
        )


def test_an_object_in_place_of_the_class_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = told("wrong_object", GOOD + REGISTER.format("Good()"), tmp_path, monkeypatch)
    assert said == (
        "plugin 'x' (wrong_object) could not be loaded: MethodError: plugin 'x' offers Good(), an "
        "object, which is not a class. Call register(Good). The other plugins are there."
    )
    said = told("wrong_point", GOOD, tmp_path, monkeypatch, ":Good")
    assert said == (
        "plugin 'x' (wrong_point:Good) could not be loaded: MethodError: plugin 'x' is the class "
        "Good, but an entry point names a module. Leave out what follows the colon, and offer the "
        "class in that module's register_methods(register). The other plugins are there."
    )


@pytest.mark.parametrize("group", ["surgery.plugins", "surgery_methods", "sugery"])
def test_a_wrong_group_is_told_where_its_method_is_missed(
    group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {group: [EntryPoint("red", "surgery_red", group)], "console_scripts": []}

    def listed(group: str | None = None) -> Any:
        return types.SimpleNamespace(groups=points) if group is None else points[group]

    monkeypatch.setattr(plugin_errors, "entry_points", listed)
    with pytest.raises(surgery.MethodError) as error:
        Registry().method("red", {})
    assert str(error.value) == (
        "no method 'red'. Methods here: none.\n  plugin 'red' (surgery_red) is listed under the "
        f"entry-point group {group!r}, which is not read. Write [project.entry-points.surgery] in "
        "its pyproject.toml, and install it again."
    )


def test_the_groups_of_this_installation_are_right() -> None:
    assert "surgery" in entry_points().groups
    assert plugin_errors.under_other_groups() == []


def test_a_class_of_a_notebook_is_registered_and_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Registry()
    monkeypatch.setattr("surgery.plugin.lookup.registry", lambda: made)

    def cell() -> type[surgery.Method]:
        @surgery.register
        @dataclass(frozen=True)
        class Mine(surgery.Method):
            """A method."""

            name = "mine"

        return Mine

    cell()
    again = cell()
    assert surgery.methods() == {"mine": again}
    plugin("plugin_of_notebook", "taken")
    made.load([point("x", "plugin_of_notebook")])
    taken = type("Taken", (again,), {"name": "taken"})
    with pytest.raises(surgery.MethodError) as error:
        surgery.register(taken)
    assert str(error.value) == (
        "surgery.register was given Taken, but plugin 'x' offers a method 'taken'. Give the class "
        "another name."
    )
    with pytest.raises(surgery.MethodError, match=r"was given .*an object, which is not a"):
        surgery.register(again())  # type: ignore[type-var]
    with pytest.raises(surgery.MethodError, match=r"Write class int\(surgery.Method\)"):
        surgery.register(int)


def test_a_method_is_spliced_by_its_name_and_a_class_is_told() -> None:
    model = build("gpt2")
    assert surgery.splice(model, "lora").methods == (surgery.method("lora"),)
    surgery.splice(model, ["ia3", surgery.method("lora", rank=2)], name="both")
    with pytest.raises(surgery.SpliceError) as error:
        surgery.splice(model, surgery.methods()["lora"], name="c")  # type: ignore[arg-type]
    assert str(error.value) == (
        "LoRA is a class, not a method with its options. Pass an object of it: LoRA(), or 'lora'. "
        "Nothing has changed."
    )
    with pytest.raises(surgery.MethodError, match=r"no method 'dore'"):
        surgery.splice(model, "dore", name="c")
    with pytest.raises(surgery.SpliceError, match="3 is not a method"):
        surgery.splice(model, 3, name="c")  # type: ignore[arg-type]
