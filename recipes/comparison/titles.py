"""Fill in the settings that a grid's title names, so that it is true of overridden runs, too.

title: "SST-2, {training.max_steps} steps of {training.per_device_train_batch_size}"
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from surgery import RecipeError
from surgery_recipes.comparison.grid import Grid, cells, recipe_of
from surgery_recipes.recipe_files import shown


def titled(grid: Grid) -> Grid:
    """Return the grid with its title filled in.

    A setting that differs between the runs gives all its values, as in "100 or 200 steps".

    Raises:
        RecipeError: the title names a setting that no run has.
    """

    def value(found: re.Match[str]) -> str:
        values = [_value(grid, found[1], recipe) for recipe in recipes]
        return " or ".join(dict.fromkeys(values))

    if "{" not in grid.title:
        return grid
    recipes = [dataclasses.asdict(recipe_of(grid, cell)) for cell in cells(grid)]
    return dataclasses.replace(grid, title=re.sub(r"\{([\w.]+)\}", value, grid.title))


def _value(grid: Grid, name: str, recipe: dict[str, Any]) -> str:
    place: Any = recipe
    for key in name.split("."):
        if not isinstance(place, dict) or key not in place:
            raise RecipeError(
                f"title {shown(grid.title)}: the runs have no setting {shown(name)}. Write it as "
                "in an override, such as {training.max_steps}."
            )
        place = place[key]
    return str(place)
