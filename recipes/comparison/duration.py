"""Say before the start about how long a grid takes, and shorten its runs to fit a time."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery import RecipeError
from surgery_recipes.comparison.grid import Cell, Grid, recipe_of
from surgery_recipes.run import Cost, cost

STEPS = "steps.json"
UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float:
    """The seconds of a text such as ``90min`` or ``1.5h``.

    Raises:
        RecipeError: it is no such text.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*(s|min|h|d)", text)
    if not found or not float(found[1]):
        raise RecipeError(f"--budget {text!r}: write a number and a unit: 30min, 1.5h, 2d.")
    return float(found[1]) * UNITS[found[2]]


def shown(seconds: float) -> str:
    """Seconds in the largest unit that gives one or more."""
    for unit, size in reversed(UNITS.items()):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}"
    return "1 s"


def costs(grid: Grid, todo: Sequence[Cell], trust: bool) -> dict[str, Cost]:
    """The cost of a run of each task, measured on its first row that trains something inserted."""
    found: dict[str, Cost] = {}
    for cell in todo:
        recipe = recipe_of(grid, cell)
        if cell.task not in found and recipe.splice and not recipe.frozen:
            found[cell.task] = cost(recipe, trust)
    return found


def total(found: Mapping[str, Cost], todo: Sequence[Cell], workers: int) -> float:
    """The seconds of all runs, side by side on so many devices."""
    return sum(found[cell.task].seconds for cell in todo if cell.task in found) / max(1, workers)


def fitted(
    grid: Grid, found: Mapping[str, Cost], todo: Sequence[Cell], workers: int, seconds: float
) -> Grid:
    """Give each task fewer steps, in one proportion, so that all runs fit a time.

    The steps are kept in ``steps.json`` of the grid's folder: the same command goes on with them.

    Raises:
        RecipeError: the answers alone take longer.
    """
    file = Path(grid.output) / STEPS
    kept = json.loads(file.read_text()) if file.is_file() else {}
    if kept.get("seconds") == seconds:
        return _with_steps(grid, kept["steps"])
    fixed = sum(found[c.task].scoring for c in todo if c.task in found) / max(1, workers)
    rest = total(found, todo, workers) - fixed
    if fixed + rest <= seconds:
        return grid
    part = (seconds - fixed) / rest if rest else 0.0
    if part <= 0:
        raise RecipeError(
            f"--budget: to score the runs takes about {shown(fixed)} alone. Give more time, or "
            "score less: limit={test: 100}."
        )
    steps = {task: max(1, int(each.steps * part)) for task, each in found.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"seconds": seconds, "steps": steps}))
    return _with_steps(grid, steps)


def _with_steps(grid: Grid, steps: Mapping[str, int]) -> Grid:
    more = {
        task: [*grid.task_set.get(task, []), f"training.max_steps={count}"]
        for task, count in steps.items()
    }
    return dataclasses.replace(grid, task_set={**grid.task_set, **more})
