"""Show in the tables what was chosen for each row: its learning rate and its size."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_recipes.comparison.grid import Cell, Choice, Grid, recipe_of
from surgery_recipes.comparison.trials import learns

EDGE = " (edge)"


def columns(grid: Grid) -> list[str]:
    """The heads of the columns: none if nothing was chosen."""
    chosen = grid.chosen.values()
    rate, size = any(c.rate for c in chosen), any(c.size for c in chosen)
    return ["learning rate"] * rate + ["size"] * size


def cells_of(grid: Grid, row: str, tasks: Sequence[str]) -> list[str]:
    """The cells of a row below :func:`columns`, of all its tasks."""
    own = [grid.chosen.get(f"{task}/{row}", Choice()) for task in tasks]
    texts = {
        "learning rate": [f"{c.rate:g}{EDGE * c.edge}" if c.rate else "" for c in own],
        "size": [c.size for c in own],
    }
    return [_joined(texts[head]) for head in columns(grid)]


def _joined(texts: list[str]) -> str:
    return texts[0] if len(set(texts)) == 1 else " / ".join(text or "-" for text in texts)


def notes(grid: Grid, cells: Sequence[Cell]) -> list[str]:
    """The sentences about what was chosen, and about rows of which nothing is trained."""
    said = []
    if grid.sweep is not None and any(c.rate for c in grid.chosen.values()):
        sweep = grid.sweep
        halved = f", the best 1/{sweep.halving} of each round going on" if sweep.halving > 1 else ""
        seeds = ", ".join(map(str, sweep.seeds))
        said.append(
            f"Learning rates: chosen on validation among {len(sweep.rates)} for each recipe, "
            f"{sweep.budget:,} steps in all{halved}; seeds of the trials: {seeds}. They win over "
            "rates in the settings below. Curves: sweep.png, trials: sweep.csv."
        )
        for name, choice in grid.chosen.items():
            if choice.edge:
                tried = sweep.rates_of(name.partition("/")[2])
                said.append(
                    f"The best rate of {name}, {choice.rate:g}, is at the edge of its range, "
                    f"{tried[0]:g} to {tried[-1]:g}: the best may lie outside. Widen the range."
                )
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(f"{cell.task}/{cell.row}", cell)
    if grid.budget is not None:
        said.append(
            f"Budget: {grid.budget} of the base's parameters. Sizes: the nearest not above it, in "
            "the proportions of the recipe; a new head does not count."
        )
        free = dict.fromkeys(
            cell.row for name, cell in first.items()
            if not grid.chosen.get(name, Choice()).size
        )  # fmt: skip
        if free:
            said.append(f"Outside the budget, as no option sets their size: {', '.join(free)}.")
    for name, cell in first.items():
        recipe = recipe_of(grid, cell)
        if recipe.frozen:
            what = "the new head alone is trained" if learns(recipe) else "nothing is trained"
            said.append(f"{name}: the untouched base; {what}.")
    return said
