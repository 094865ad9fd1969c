"""Grid: which recipes a table compares, read and checked before anything runs.

A grid is a YAML file: which tasks, which rows, which scores, and what the paper reports.

    title: Table 1            output: runs/table1           baseline: prefix
    tasks: [webnlg, coqa]     rows: [prefix, inducer]       set: [training.num_train_epochs=5]
    scores: {webnlg: [bleu_seen, bleu], coqa: [em, f1]}
    paper: {inducer: {webnlg.bleu: 49.2, coqa.f1: 66.1}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery import RecipeError, suggest
from surgery_recipes import shipped
from surgery_recipes.build import plan
from surgery_recipes.folder import begun, finished, same_settings
from surgery_recipes.layered_yaml import read_extended
from surgery_recipes.prepare import Prepared, prepare
from surgery_recipes.recipe import Recipe, read_recipe
from surgery_recipes.trainer import arguments


@dataclass(frozen=True)
class Grid:
    """What to run, and how to show it.

    Attributes:
        title, about: of the table.  output: its folder.
        tasks, rows: recipes TASK/ROW; a row that a task has not is left out.
        scores: by task, the columns; the first is the one that is plotted and tested.
        seeds: of the runs.
        set: ``key=value`` overrides for every run.  task_set, row_set: those of one task or row.
        given: overrides from the command line, which come last.
        baseline: the row that the others are tested against.
        paper: by row, ``TASK.SCORE: number``, to stand beside ours.
    """

    title: str
    tasks: list[str]
    rows: list[str]
    scores: dict[str, list[str]]
    output: str = "runs/table"
    about: str = ""
    seeds: list[int] = field(default_factory=lambda: [1])
    set: list[str] = field(default_factory=list)
    task_set: dict[str, list[str]] = field(default_factory=dict)
    row_set: dict[str, list[str]] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)
    baseline: str = ""
    paper: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    task: str
    row: str
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.task}/{self.row} {self.seed}"

    @property
    def finished(self) -> bool:
        return finished(self.folder)

    @property
    def begun(self) -> bool:
        return begun(self.folder)


def read_grid(path: str | Path) -> Grid:
    """Read a grid from a YAML file, or by the name of one that is shipped.

    Raises:
        RecipeError: no such file, an unknown key, task, row or baseline, or a bad value.
    """
    file = shipped.find_table(str(path))
    content = read_extended(file)
    known = {f.name: f for f in dataclasses.fields(Grid) if f.name != "given"}
    for key, value in content.items():
        if key not in known:
            raise RecipeError(
                f"{path}: unknown key {key!r}. {suggest(str(key), known)}Keys: {', '.join(known)}."
            )
        kind = {"dict": dict, "list": list}.get(str(known[key].type).partition("[")[0], str)
        if type(value) is not kind:
            raise RecipeError(f"{path}: {key}={value!r} must be a {kind.__name__}.")
    for key in ("title", "tasks", "rows", "scores"):
        if not content.get(key):
            raise RecipeError(f"{path}: the key {key!r} is missing or empty.")
    grid = Grid(**content)
    recipes = shipped.shipped()
    names = {name.split("/")[-1] for name in recipes}
    for row in grid.rows:
        if not any(f"{task}/{row}" in recipes for task in grid.tasks):
            raise RecipeError(f"{path}: no task has a row {row!r}. {suggest(row, names)}")
    for task in grid.tasks:
        if task not in grid.scores:
            raise RecipeError(f"{path}: which scores of task {task!r}? Add them to 'scores'.")
    if not grid.seeds or not all(type(seed) is int for seed in grid.seeds):
        raise RecipeError(f"{path}: seeds={grid.seeds!r} must be numbers, one or more.")
    for key in ("tasks", "rows", "seeds"):
        twice = [x for x in getattr(grid, key) if getattr(grid, key).count(x) > 1]
        if twice:
            raise RecipeError(f"{path}: {key} has {twice[0]!r} twice.")
    lists: dict[str, Any] = {"set": grid.set}
    for key in ("scores", "task_set", "row_set"):
        lists |= {f"{key} of {name}": texts for name, texts in getattr(grid, key).items()}
    for what, texts in lists.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise RecipeError(f"{path}: {what} is {texts!r}; write a list of texts, [a=1, b=2].")
    if grid.baseline and grid.baseline not in grid.rows:
        raise RecipeError(f"{path}: the baseline {grid.baseline!r} is none of the rows.")
    columns = {f"{task}.{name}" for task in grid.tasks for name in grid.scores[task]}
    _known(path, "task_set", grid.task_set, grid.tasks)
    _known(path, "row_set", grid.row_set, grid.rows)
    _known(path, "paper", grid.paper, grid.rows)
    for row, numbers in grid.paper.items():
        _known(path, f"paper of {row}", numbers, columns)
    return grid


def _known(path: str | Path, key: str, given: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in given:
        if name not in names:
            raise RecipeError(f"{path}: {key} has {name!r}. {suggest(name, names)}")


def cells(grid: Grid) -> list[Cell]:
    """Every run, seed by seed, so that one seed of all is there first."""
    recipes = shipped.shipped()
    return [
        Cell(task, row, seed, Path(grid.output) / task / row / str(seed))
        for seed in grid.seeds
        for task in grid.tasks
        for row in grid.rows
        if f"{task}/{row}" in recipes
    ]


def settings(grid: Grid, cell: Cell) -> list[str]:
    """The overrides of one run; later ones win."""
    own = [*grid.set, *grid.task_set.get(cell.task, []), *grid.row_set.get(cell.row, [])]
    return [*own, *grid.given, f"training.seed={cell.seed}", f"output={cell.folder}"]


def recipe_of(grid: Grid, cell: Cell) -> Recipe:
    """What one run trains, all resolved."""
    return read_recipe(shipped.find(f"{cell.task}/{cell.row}"), settings(grid, cell))


def check(grid: Grid, everything: list[Cell]) -> None:
    """Find what would fail in some run, or what an earlier run did under other settings.

    Raises:
        RecipeError: a bad setting, missing data, a model of the wrong kind, an example that is too
            long, or a folder with something else.
    """
    tried: set[str] = set()
    for cell in everything:
        recipe = recipe_of(grid, cell)
        if cell.finished or cell.begun:
            same_settings(cell.folder, recipe, "this grid asks for")
        if cell.finished:
            continue
        plan(recipe)
        arguments(recipe)
        same = repr((recipe.task, recipe.model, recipe.data, recipe.limit))
        if same not in tried:
            _check_scores(grid, cell.task, prepare(recipe))
            tried.add(same)


def _check_scores(grid: Grid, name: str, prepared: Prepared) -> None:
    """Raise unless the task gives every score that is a column, or says why it does not."""
    task, given = prepared.task, set(prepared.task.notes())
    for split in prepared.scored:
        examples = prepared.examples[split]
        answer: Any = 0 if task.kind == "classifier" else "a"
        given |= set(task.score([answer] * len(examples), examples))
    for score in grid.scores[name]:
        if score not in given and score.partition("_")[0] not in task.notes():
            raise RecipeError(
                f"scores: task {name!r} gives no {score!r}. {suggest(score, given)}"
                f"It gives: {', '.join(sorted(given))}."
            )
