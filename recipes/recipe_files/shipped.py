"""Find the recipes and tables that come with the package by their names.

A recipe is a file of its own, such as ``quickstart.yaml``, or a row of a task. ``webnlg/inducer``
is three layers, of which later ones win:

    bases/webnlg.yaml        the task, on top of the settings of its family, ``bases/nlg.yaml``
    rows/nlg/inducer.yaml    the methods of one row of the papers' tables, for that family
    output: runs/webnlg/inducer

Every task of a family has every row of it. The family of a task is the file that the task's base
extends.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TypeVar

from surgery import RecipeError, suggest
from surgery_recipes.recipe_files.layered_yaml import extended
from surgery_recipes.recipe_files.plain_yaml import is_file
from surgery_recipes.recipe_files.recipe import RecipeFiles
from surgery_recipes.recipe_files.shown_values import short

HERE = Path(__file__).parents[1]
Found = TypeVar("Found")


def shipped_recipes() -> dict[str, RecipeFiles]:
    """Every shipped recipe by its name: ``quickstart``, ``webnlg/inducer`` and so on."""
    alone = {path.stem: RecipeFiles(path.stem, (path,)) for path in sorted(HERE.glob("*.yaml"))}
    rows = {
        (name := f"{task}/{row.stem}"): RecipeFiles(name, (base, row), output=f"runs/{name}")
        for task, base in _tasks().items()
        for row in _rows(base)
    }
    return alone | rows


def shipped_tables() -> dict[str, Path]:
    """Every shipped table by its name: ``table1`` and so on."""
    return {path.stem: path for path in sorted((HERE / "tables").glob("*.yaml"))}


def find_recipe(name: str) -> RecipeFiles:
    """The files of a shipped recipe, or the one file that a path leads to.

    Raises:
        RecipeError: no recipe has the name, and no file is there.
    """
    if is_file(Path(name)):
        return RecipeFiles(name, (Path(name),))
    task, _, row = name.partition("/")
    more = ""
    if row:
        rows = {known: [path.stem for path in _rows(base)] for known, base in _tasks().items()}
        having = [known for known, own in rows.items() if row in own]
        more += f"Tasks with a row {short(row)!r}: {', '.join(having)}. " if having else ""
        more += f"Rows of task {short(task)}: {', '.join(rows[task])}. " if task in rows else ""
    return _named(name, "recipe", shipped_recipes(), more)


def find_table(name: str) -> Path:
    """The file of a shipped table, or the file that a path leads to.

    Raises:
        RecipeError: no table has the name, and no file is there.
    """
    return Path(name) if is_file(Path(name)) else _named(name, "table", shipped_tables(), "")


def _named(name: str, what: str, known: Mapping[str, Found], more: str) -> Found:
    if name not in known:
        raise RecipeError(
            f"{short(name)}: no such {what}. {suggest(name, known)}{more}Give the path of a YAML "
            "file, or a name that `surgery recipes` lists."
        )
    return known[name]


@cache
def _tasks() -> dict[str, Path]:
    """The base of each task. The base of a family extends nothing."""
    bases = sorted((HERE / "bases").glob("*.yaml"))
    return {path.stem: path for path in bases if extended(path)}


@cache
def _rows(base: Path) -> list[Path]:
    """The rows of the family that a task's base extends."""
    return [
        row
        for family in extended(base)
        for row in sorted((HERE / "rows" / family.stem).glob("*.yaml"))
    ]
