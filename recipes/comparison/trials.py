"""The trials of a sweep: short runs of one row at one learning rate, scored on validation alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import surgery
from surgery import RecipeError
from surgery_recipes.comparison.grid import Cell, Grid, cells, recipe_of
from surgery_recipes.comparison.sweep_plan import Sweep
from surgery_recipes.recipe_files import Recipe, reason
from surgery_recipes.run import main_score

ALONE = (  # nothing is chosen within a trial, so nothing but its last step is scored
    "training.eval_strategy=no", "training.save_strategy=no", "patience=0", "baseline=false",
    "training.load_best_model_at_end=false", "validate_only=true",
)  # fmt: skip
WARM = 0.1


@dataclass(frozen=True)
class Trial(Cell):
    """One short run of a recipe, at one learning rate."""

    rate: float = 0.0

    def __str__(self) -> str:
        return f"{self.task}/{self.row} at {self.rate:g}, seed {self.seed}, {self.steps} steps"


def plan_of(grid: Grid) -> Sweep:
    """The sweep of a grid.

    Raises:
        RecipeError: the grid has none.
    """
    if grid.sweep is None:
        raise RecipeError(
            "--sweep: the grid does not say what to try. Add a key such as\n"
            "sweep: {low: 1e-5, high: 1e-1, points: 9, steps: 100, seeds: [1], halving: 2}"
        )
    return grid.sweep


def swept(grid: Grid) -> list[tuple[str, str]]:
    """The task and row of every recipe that has a learning rate to choose."""
    pairs = dict.fromkeys((cell.task, cell.row) for cell in cells(grid))
    first = {(cell.task, cell.row): cell for cell in reversed(cells(grid))}
    return [pair for pair in pairs if learns(recipe_of(grid, first[pair]))]


def learns(recipe: Recipe) -> bool:
    """Whether anything is trained: of a frozen base, the new head of a classifier is."""
    return not recipe.frozen or surgery.tasks()[recipe.task].kind != "decoder"


def trial(grid: Grid, task: str, row: str, rate: float, seed: int, steps: int) -> Trial:
    """The trial of one recipe at one rate."""
    sweep = plan_of(grid)
    rate_text = f"training.learning_rate={rate!r}"
    own = (rate_text, f"training.max_steps={steps}", *ALONE)
    whole = recipe_of(grid, Cell(task, row, seed, Path(grid.output)))
    # A warm-up of so many steps is made for a long run: in a short one it would be all there is.
    warm = whole.training.get("warmup_steps", 0)
    if isinstance(warm, (int, float)) and warm >= 1 and warm > WARM * steps:
        own += (f"training.warmup_steps={WARM}",)
    name = str(seed) if steps == sweep.steps else f"{seed}_{steps}_steps"
    folder = Path(grid.output) / "sweep" / task / row / repr(rate) / name
    return Trial(task, row, seed, folder, (*own, *sweep.set), steps, rate)


def possible(grid: Grid) -> list[Trial]:
    """Every trial that the sweep may come to, to check before the first begins."""
    sweep = plan_of(grid)
    return [
        trial(grid, task, row, rate, seed, steps)
        for task, row in swept(grid)
        for _, steps in sweep.rounds
        for rate in sweep.rates_of(row)
        for seed in sweep.seeds
    ]


@dataclass(frozen=True)
class Score:
    """What a finished trial scored.

    Attributes:
        name: which score.
        value: the score; NaN if the trial did not finish or diverged.
        why: why it is NaN.
    """

    name: str
    value: float
    why: str = ""

    @property
    def good(self) -> bool:
        return math.isfinite(self.value)


def read_score(grid: Grid, one: Trial) -> Score:
    """The validation score of a trial."""
    if not one.finished:
        return Score("", math.nan, f"failed, see {one.folder}/log.txt")
    file = one.folder / "metrics.json"
    try:
        last = json.loads(file.read_bytes())["rows"][-1]
        name = main_score(recipe_of(grid, one), last["scores"])
        value, losses = last["scores"][name], last.get("losses", [])
    except (ValueError, LookupError, TypeError, StopIteration) as error:
        raise RecipeError(f"{file} is damaged: {reason(error)}. Run it again.") from error
    if value is None or any(loss is None for _, loss in losses):
        return Score(name, math.nan, "its loss or score is not a finite number")
    return Score(name, float(value))
