"""Read a grid, which says which recipes a table compares, and check all its runs beforehand.

A grid is a YAML file with its tasks, rows and scores, and the numbers that a paper reports.

    title: Table 1            output: runs/table1           baseline: prefix
    tasks: [webnlg, coqa]     rows: [prefix, inducer]       set: [training.num_train_epochs=5]
    scores: {webnlg: [bleu_seen, bleu], coqa: [em, f1]}
    paper: {inducer: {webnlg.bleu: 49.2, coqa.f1: 66.1}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery import RecipeError, suggest
from surgery_recipes.comparison.sweep_plan import Budget, Sweep, read_budget, read_sweep
from surgery_recipes.recipe_files import (
    Recipe,
    find_recipe,
    find_table,
    read_extended,
    read_recipe,
    shipped_recipes,
    shown,
)
from surgery_recipes.run import (
    Prepared,
    begun,
    finished,
    planned_methods,
    prepare_run,
    same_settings,
    training_arguments,
)

CLAIM = ("better", "than", "score")


@dataclass(frozen=True)
class Choice:
    """What was chosen for one recipe, in place of its own settings.

    Attributes:
        rate: the learning rate; None if it was not searched.
        edge: whether the rate is the first or last of those that were tried.
        size: the options that set its size, as text.
        set: the ``key=value`` overrides that this makes.
    """

    rate: float | None = None
    edge: bool = False
    size: str = ""
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """What to run and what to show of it.

    Attributes:
        title: the title of the table.
        about: a sentence below the table.
        output: the folder of the table and its runs.
        tasks, rows: the recipes TASK/ROW. A row that a task does not have is left out.
        scores: for each task, the scores to show; the first one is plotted.
        seeds: the seeds of the runs.
        set: ``key=value`` overrides for every run.
        task_set, row_set: overrides for the runs of one task or row.
        given: overrides from the command line, which win over the others.
        baseline: the row that the others are tested against.
        paper: for each row, ``TASK.SCORE: number``, to show beside ours.
        claims: sentences of a paper to test, each with the row that is ``better``, the row ``than``
            which it is, and the ``score``, TASK.SCORE.
        sweep: how ``surgery compare --sweep`` chooses a learning rate for each row.
        budget: how many parameters each row may have; its size is chosen so.
        chosen: by ``TASK/ROW``, the rate and sizes that were chosen. A file does not set it.
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
    claims: dict[str, dict[str, str]] = field(default_factory=dict)
    sweep: Sweep | None = None
    budget: Budget | None = None
    chosen: dict[str, Choice] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        task, row: which recipe.
        seed: the seed of the run.
        folder: where the run writes.
        set: overrides of this run alone, which win over all others.
        steps: how much the run counts in a bar of progress.
    """

    task: str
    row: str
    seed: int
    folder: Path
    set: tuple[str, ...] = ()
    steps: int = 1

    def __str__(self) -> str:
        return f"{self.task}/{self.row} {self.seed}"

    @property
    def finished(self) -> bool:
        return finished(self.folder)

    @property
    def begun(self) -> bool:
        return begun(self.folder)


def read_grid(path: str | Path) -> Grid:
    """Read a grid from a YAML file, or from the shipped table of that name.

    Raises:
        RecipeError: there is no such file, a key, task, row or baseline is unknown, or a value is
            of the wrong kind.
    """
    file = find_table(str(path))
    content = read_extended(file)
    known = {f.name: f for f in dataclasses.fields(Grid) if f.name not in ("given", "chosen")}
    for key, value in content.items():
        if key not in known:
            raise RecipeError(
                f"{path}: unknown key {shown(key)}. {suggest(str(key), known)}"
                f"Keys: {', '.join(known)}."
            )
        if key not in ("sweep", "budget"):
            _check_type(f"{path}: {key}", value, str(known[key].type))
    for key in ("title", "tasks", "rows", "scores"):
        if not content.get(key):
            raise RecipeError(f"{path}: the key {key!r} is missing or empty.")
    if "budget" in content:
        content["budget"] = read_budget(f"{path}: budget", content["budget"])
    if "sweep" in content:
        content["sweep"] = read_sweep(f"{path}: sweep", content["sweep"], content["rows"])
    grid = Grid(**content)
    recipes = shipped_recipes()
    names = {name.split("/")[-1] for name in recipes}
    for row in grid.rows:
        if not any(f"{task}/{row}" in recipes for task in grid.tasks):
            raise RecipeError(f"{path}: no task has a row {shown(row)}. {suggest(row, names)}")
    for task in grid.tasks:
        if task not in grid.scores:
            raise RecipeError(f"{path}: no scores of task {shown(task)}. Add them to 'scores'.")
        if not grid.scores[task]:
            raise RecipeError(f"{path}: scores of {task} is empty. Name one or more.")
    if not grid.seeds:
        raise RecipeError(f"{path}: seeds=[] must be numbers, one or more.")
    for key in ("tasks", "rows", "seeds"):
        twice = [x for x in getattr(grid, key) if getattr(grid, key).count(x) > 1]
        if twice:
            raise RecipeError(f"{path}: {key} has {shown(twice[0])} twice.")
    if grid.baseline and grid.baseline not in grid.rows:
        raise RecipeError(
            f"{path}: the baseline {shown(grid.baseline)} is not one of the rows."
            f" Rows: {', '.join(grid.rows)}."
        )
    columns = {f"{task}.{name}" for task in grid.tasks for name in grid.scores[task]}
    _known(path, "task_set", grid.task_set, grid.tasks)
    _known(path, "row_set", grid.row_set, grid.rows)
    _known(path, "paper", grid.paper, grid.rows)
    for row, numbers in grid.paper.items():
        _known(path, f"paper of {row}", numbers, columns)
    for text, claim in grid.claims.items():
        _known(path, f"the claim {shown(text)}", claim, CLAIM)
        for key in CLAIM:
            if key not in claim:
                raise RecipeError(f"{path}: the claim {shown(text)} says no {key!r}.")
            names = columns if key == "score" else grid.rows
            _known(path, f"the claim {shown(text)}", [claim[key]], names)
    return grid


def _check_type(what: str, value: Any, kind: str) -> None:
    """Raise unless a value has the type of an annotation, such as ``dict[str, list[str]]``."""
    outer, _, rest = kind.partition("[")
    inner = rest[:-1].removeprefix("str, ")
    types = {"dict": (dict,), "list": (list,), "str": (str,), "int": (int,), "float": (int, float)}
    texts = kind != "list[str]" or all(isinstance(text, str) for text in value)
    if type(value) not in types[outer] or not texts:
        also = ": write a list of texts, [a=1, b=2]" if kind == "list[str]" else ""
        raise RecipeError(f"{what} is {shown(value)}; it must be a {kind}{also}.")
    for name, each in value.items() if outer == "dict" else ():
        _check_type(f"{what} of {shown(name)[1:-1]}", each, inner)
    for each in value if kind == "list[int]" else ():
        _check_type(f"{what} of {shown(value)}", each, inner)


def _known(path: str | Path, key: str, given: Iterable[str], names: Iterable[str]) -> None:
    """Raise if a name in ``given`` is not one of ``names``."""
    for name in given:
        if name not in names:
            raise RecipeError(f"{path}: {key} has {shown(name)}. {suggest(name, names)}")


def cells(grid: Grid) -> list[Cell]:
    """Every run, ordered by seed, so that all recipes have one result before any has two."""
    recipes = shipped_recipes()
    return [
        Cell(task, row, seed, Path(grid.output) / task / row / str(seed))
        for seed in grid.seeds
        for task in grid.tasks
        for row in grid.rows
        if f"{task}/{row}" in recipes
    ]


def settings(grid: Grid, cell: Cell) -> list[str]:
    """The overrides of one run, of which later ones win."""
    own = [*grid.set, *grid.task_set.get(cell.task, []), *grid.row_set.get(cell.row, [])]
    chosen = grid.chosen.get(f"{cell.task}/{cell.row}", Choice()).set
    own += [*grid.given, *chosen, *cell.set]
    return [*own, f"training.seed={cell.seed}", f"output={cell.folder}"]


def recipe_of(grid: Grid, cell: Cell) -> Recipe:
    """The recipe of one run, with all its overrides."""
    return read_recipe(find_recipe(f"{cell.task}/{cell.row}"), settings(grid, cell))


def models(grid: Grid) -> list[str]:
    """The models of all runs, each once."""
    return list(dict.fromkeys(recipe_of(grid, cell).model for cell in cells(grid)))


def check(grid: Grid, everything: list[Cell], trust: bool = False) -> None:
    """Check the settings, data and model of every run, before any of them starts.

    Raises:
        RecipeError: a setting is wrong, data are missing, the model is of the wrong kind, an
            example is too long, or a folder holds a run with other settings.
    """
    tried: set[str] = set()
    for cell in everything:
        recipe = recipe_of(grid, cell)
        if cell.finished or cell.begun:
            same_settings(cell.folder, recipe, "this grid asks for")
        if cell.finished:
            continue
        planned_methods(recipe)
        training_arguments(recipe)
        same = repr((recipe.task, recipe.model, recipe.data, recipe.limit, recipe.validate_only))
        if same not in tried:
            prepared = prepare_run(recipe, trust)
            if not recipe.validate_only:
                _check_scores(grid, cell.task, prepared)
            tried.add(same)


def _check_scores(grid: Grid, name: str, prepared: Prepared) -> None:
    """Raise unless the task computes every score to show, or its notes say why it does not."""
    task, given = prepared.task, set(prepared.task.notes())
    for split in prepared.scored:
        examples = prepared.examples[split]
        answer: Any = "a" if task.kind == "decoder" else 0
        given |= set(task.score([answer] * len(examples), examples))
    for score in grid.scores[name]:
        if score not in given and score.partition("_")[0] not in task.notes():
            raise RecipeError(
                f"scores: task {name!r} has no score {shown(score)}. {suggest(score, given)}"
                f"Scores: {', '.join(sorted(given))}."
            )
