"""Find the runs below a folder, and tell two of them apart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery import RecipeError, suggest
from surgery_recipes.recipe_files import Recipe, parse_value, read_recipe, shown
from surgery_recipes.run.run_folder import METRICS, RECIPE, begun, differences


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: where it is.
        recipe: its settings.
        state: ``finished``, ``unfinished`` (can be resumed) or ``broken``.
        scores: of the trained model; empty unless the run has finished.
        percent: inserted parameters in per cent of the base's.
        seconds: how long training took.
    """

    folder: Path
    recipe: Recipe
    state: str
    scores: dict[str, float] = field(default_factory=dict)
    percent: float = 0.0
    seconds: float = 0.0

    @property
    def methods(self) -> str:
        return " + ".join(entry["method"] for entry in self.recipe.splice) or "fine-tuning"


def find_runs(root: Path, where: Sequence[str] = ()) -> list[Run]:
    """Return the runs below a folder, by path.

    Args:
        root: the folder.
        where: settings that a run must have, such as ``task=sst2`` or
            ``training.learning_rate=1e-3``.

    Raises:
        RecipeError: there is no such folder, or a condition is not ``key=value``.
    """
    if not root.is_dir():
        raise RecipeError(f"{root}: no such folder. Give the folder that holds your runs.")
    asked = [_condition(text) for text in where]
    return [run for run in _all(root) if all(_has(run, key, value) for key, value in asked)]


def compare_runs(one: Path, other: Path) -> list[tuple[str, Any, Any]]:
    """Return the settings and scores in which two runs differ: name, of one, of the other.

    Raises:
        RecipeError: one of the folders holds no run.
    """
    first, second = _read(one), _read(other)
    found = [
        (name, *values)
        for name, values in differences(*(dataclasses.asdict(r.recipe) for r in (first, second)))
    ]
    for name in dict.fromkeys([*first.scores, *second.scores]):
        pair = first.scores.get(name), second.scores.get(name)
        if pair[0] != pair[1]:
            found.append((name, *pair))
    return found


def _all(root: Path) -> Iterator[Run]:
    for file in sorted(root.rglob(RECIPE)):
        try:
            yield _read(file.parent)
        except RecipeError:
            yield Run(file.parent, Recipe(model="", task="?"), "broken")


def _read(folder: Path) -> Run:
    if not (folder / RECIPE).is_file():
        raise RecipeError(f"{folder}: no {RECIPE} here. Give the output folder of a run.")
    recipe = read_recipe(folder / RECIPE)
    file = folder / METRICS
    if not file.is_file():
        return Run(folder, recipe, "unfinished" if begun(folder) else "broken")
    try:
        last = json.loads(file.read_bytes())["rows"][-1]
        scores = {name: value for name, value in last["scores"].items() if value is not None}
        return Run(folder, recipe, "finished", scores, last["percent"], last["seconds"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return Run(folder, recipe, "broken")


def _condition(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--where {shown(text)}: write key=value, such as task=sst2.")
    known = [f.name for f in dataclasses.fields(Recipe)]
    first = name.split(".")[0]
    if first not in (*known, "method"):
        raise RecipeError(f"--where {shown(text)}: no such setting. {suggest(first, known)}")
    return name, parse_value(value)


def _has(run: Run, name: str, value: Any) -> bool:
    if name == "method":
        return value in [entry["method"] for entry in run.recipe.splice]
    place: Any = dataclasses.asdict(run.recipe)
    for key in name.split("."):
        place = place.get(key) if isinstance(place, dict) else None
    return bool(place == value)
