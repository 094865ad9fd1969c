"""``extends``: mappings merge, lists are replaced, loops and missing files are named."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import RecipeError
from surgery_recipes.recipe_files import override, read_recipe


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "top.yaml"


def test_mappings_merge_and_lists_are_replaced(tmp_path: Path) -> None:
    top = write(
        tmp_path,
        base="model: m\ntask: t\ntraining: {a: 1, b: 2}\nsplice: [{method: lora}]",
        other="training: {b: 3, c: 4}",
        top="extends: [base.yaml, other.yaml]\ntraining: {c: 5}\nsplice: [{method: inducer}]",
    )
    recipe = read_recipe(top, ["training.d=1e-3", "data=some/folder"])
    assert recipe.training == {"a": 1, "b": 3, "c": 5, "d": 0.001}
    assert recipe.splice == [{"method": "inducer"}]
    assert recipe.data == {"path": "some/folder"}


def test_values_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    top = write(tmp_path, top="model: m\ntask: t\ntraining: {a: no, b: true, c: 1e-3, d: off}")
    recipe = read_recipe(top, ["training.e=no", "training.f=false"])
    values = {"a": "no", "b": True, "c": 0.001, "d": "off", "e": "no", "f": False}
    assert recipe.training == values


def test_a_loop_is_named_with_its_way(tmp_path: Path) -> None:
    top = write(tmp_path, top="extends: mid.yaml", mid="extends: top.yaml")
    with pytest.raises(RecipeError, match=r"extends itself: top.yaml -> mid.yaml -> top.yaml"):
        read_recipe(top)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("extends: gone.yaml", "gone.yaml: no such recipe. .*top.yaml extends it"),
        ("extends: 3", "extends=3 must be the path of a YAML file, or a list"),
        ("[1, 2]", "a recipe is a mapping"),
        ("a: [", "this is not YAML"),
    ],
)
def test_a_bad_file_is_named(text: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=part):
        read_recipe(write(tmp_path, top=text))


def test_files_that_extend_each_other_many_times_are_refused(tmp_path: Path) -> None:
    files = {f"f{i}": f"extends: [{', '.join([f'f{i + 1}.yaml'] * 9)}]" for i in range(8)}
    with pytest.raises(RecipeError, match="extends more than 100 files"):
        read_recipe(write(tmp_path, top="extends: f0.yaml", **files, f8="model: m"))


def test_an_override_changes_one_of_two_aliases(tmp_path: Path) -> None:
    top = write(tmp_path, top="model: m\ntask: t\ndata: &d {a: 1}\ntraining: *d")
    recipe = read_recipe(top, ["data.a=2"])
    assert (recipe.data, recipe.training) == ({"a": 2}, {"a": 1})
    with pytest.raises(RecipeError, match="more than 32 parts"):
        read_recipe(top, ["data" + ".a" * 40_000 + "=1"])


@pytest.mark.parametrize("name", [".", "x" * 300, "a\0b", "nothing.yaml"])
def test_a_path_that_leads_to_no_file_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such recipe|cannot be read|a folder or a device"):
        read_recipe(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("splice.lora.rank=3", [{"method": "lora", "rank": 3}, {"method": "prefix"}]),
        ("splice.2.length=5", [{"method": "lora"}, {"method": "prefix", "length": 5}]),
        ("splice=[]", []),
    ],
)
def test_an_override_reaches_the_options_of_a_method(text: str, expected: Any) -> None:
    content = {"splice": [{"method": "lora"}, {"method": "prefix"}]}
    override(content, text)
    assert content["splice"] == expected


@pytest.mark.parametrize("text", ["splice.lara.rank=3", "splice.3.rank=3", "splice.lora=3"])
def test_an_override_of_no_entry_is_refused(text: str) -> None:
    content = {"splice": [{"method": "lora"}, {"method": "prefix"}]}
    before = copy.deepcopy(content)
    with pytest.raises(RecipeError, match="override"):
        override(content, text)
    assert content == before
