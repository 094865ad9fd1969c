"""``extends``: mappings merge, lists are replaced, loops and missing files are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import RecipeError
from surgery_recipes.recipe_files import read_recipe


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
