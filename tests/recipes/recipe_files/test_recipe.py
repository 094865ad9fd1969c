"""A recipe is read from plain data, and a wrong one says what is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import RecipeError
from surgery_recipes.recipe_files import Recipe, make_recipe, read_recipe, write_recipe

QUICKSTART = Path(__file__).parents[3] / "recipes/quickstart.yaml"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"model": "m", "taks": "x"}, r"unknown key 'taks'. Did you mean 'task'\?"),
        ({"model": "m"}, "the key 'task' is missing"),
        ({"model": "m", "task": 3}, "task=3 must be a str"),
        ({"model": "m", "task": "t", "splice": [{"rank": 3}]}, "needs a key 'method'"),
        ({"model": "m", "task": "t", "splice": [{"method": ["x"]}]}, "method must be a name"),
        ({"model": "m", "task": "t", "keep": [3]}, r"keep=\[3\] must be names of modules"),
        ({"model": "m", "task": "t", "patience": -1}, "patience=-1 must be 0 or more"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(content: dict[str, Any], part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        make_recipe(content)


WRONG: list[Any] = [None, True, 3, 0.5, "x", [3], {"a": 3}, "x" * 10**6, [["x"] * 10**4]]
KEYS = [field.name for field in dataclasses.fields(Recipe)]


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_the_wrong_kind_is_told_in_a_line(key: str) -> None:
    whole = {"model": "m", "task": "t"}
    right = type(getattr(make_recipe(whole), key))
    for value in WRONG:
        if type(value) is not right:
            with pytest.raises(RecipeError, match=f"{key}=.* must be a {right.__name__}") as told:
                make_recipe({**whole, key: value})
            assert len(str(told.value)) < 250


@given(st.builds(Recipe, st.text(), st.text(), about=st.text() | st.just("1e5")))
def test_a_recipe_is_read_as_it_was_written(tmp_path: Path, recipe: Recipe) -> None:
    write_recipe(recipe, tmp_path / "recipe.yaml")
    if all(c.isprintable() for c in recipe.model + recipe.task + recipe.about):
        assert read_recipe(tmp_path / "recipe.yaml") == recipe


def test_numbers_in_overrides_are_numbers() -> None:
    recipe = read_recipe(QUICKSTART, ["training.learning_rate=1e-3"])
    assert recipe.training["learning_rate"] == 1e-3
