"""Recipe files: find the YAML files of a recipe, merge them, and read them into a ``Recipe``."""

from surgery_recipes.recipe_files.layered_yaml import override, read_extended
from surgery_recipes.recipe_files.plain_yaml import parse_value
from surgery_recipes.recipe_files.recipe import Recipe, make_recipe, read_recipe, write_recipe
from surgery_recipes.recipe_files.shipped import (
    find_recipe,
    find_table,
    shipped_recipes,
    shipped_tables,
)
from surgery_recipes.recipe_files.shown_values import reason, shown
from surgery_recipes.recipe_files.whole_files import write_whole

__all__ = [
    "Recipe",
    "find_recipe",
    "find_table",
    "make_recipe",
    "override",
    "parse_value",
    "read_extended",
    "read_recipe",
    "reason",
    "shipped_recipes",
    "shipped_tables",
    "shown",
    "write_recipe",
    "write_whole",
]
