"""A recipe is read from plain data, and a wrong one says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from surgery.errors import RecipeError
from surgery_recipes.recipe_files import make_recipe, read_recipe

QUICKSTART = Path(__file__).parents[3] / "recipes/quickstart.yaml"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"model": "m", "taks": "x"}, r"unknown key 'taks'. Did you mean 'task'\?"),
        ({"model": "m"}, "the key 'task' is missing"),
        ({"model": "m", "task": 3}, "task=3 must be a str"),
        ({"model": "m", "task": "t", "splice": [{"rank": 3}]}, "needs a key 'method'"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(content: dict[str, Any], part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        make_recipe(content)


def test_numbers_in_overrides_are_numbers() -> None:
    recipe = read_recipe(QUICKSTART, ["training.learning_rate=1e-3"])
    assert recipe.training["learning_rate"] == 1e-3
