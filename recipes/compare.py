"""Compare: a grid of recipes, run one by one or one per GPU, and the tables and plots of it.

A grid is a YAML file: which tasks, which rows, which scores, and what the paper reports.

    title: Table 1            output: runs/table1           baseline: prefix
    tasks: [webnlg, coqa]     rows: [prefix, inducer]       set: [training.num_train_epochs=5]
    scores: {webnlg: [bleu_seen, bleu], coqa: [em, f1]}
    paper: {inducer: {webnlg.bleu: 49.2, coqa.f1: 66.1}}

Each run is a process of its own, `surgery train TASK/ROW`, in OUTPUT/TASK/ROW/SEED. A finished one
is not run again, an unfinished one goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from surgery_recipes import shipped, tables

from surgery import RecipeError
from surgery.errors import suggest
from surgery.extend import override, read_extended

COMMAND = "from surgery.cli import app; app()"


@dataclass(frozen=True)
class Grid:
    """What to run, and how to show it.

    Attributes:
        title, about: of the table.  output: its folder.
        tasks, rows: recipes TASK/ROW; a row that a task has not is left out.
        scores: by task, the columns; the first is the one that is plotted and tested.
        seeds: of the runs.
        set: ``key=value`` overrides for every run.  task_set, row_set: those of one task or row.
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
    baseline: str = ""
    paper: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    task: str
    row: str
    seed: int
    folder: Path

    @property
    def finished(self) -> bool:
        return (self.folder / "metrics.json").is_file()

    @property
    def begun(self) -> bool:
        return any((self.folder / "checkpoints").glob("checkpoint-*"))


def read_grid(path: str | Path, overrides: list[str] | None = None) -> Grid:
    """Read a grid from YAML.

    Raises:
        RecipeError: no such file, an unknown key, task, row or baseline.
    """
    content = read_extended(Path(path))
    for text in overrides or []:
        override(content, text)
    known = [f.name for f in dataclasses.fields(Grid)]
    for key in content:
        if key not in known:
            raise RecipeError(
                f"{path}: unknown key {key!r}. {suggest(key, known)}Keys: {', '.join(known)}."
            )
    for key in ("title", "tasks", "rows", "scores"):
        if not content.get(key):
            raise RecipeError(f"{path}: the key {key!r} is missing or empty.")
    grid = Grid(**content)
    recipes = shipped.shipped()
    for row in grid.rows:
        if not any(f"{task}/{row}" in recipes for task in grid.tasks):
            names = {name.split("/")[-1] for name in recipes}
            raise RecipeError(f"{path}: no task has a row {row!r}. {suggest(row, names)}")
    for task in grid.tasks:
        if task not in grid.scores:
            raise RecipeError(f"{path}: which scores of task {task!r}? Add them to 'scores'.")
    if grid.baseline and grid.baseline not in grid.rows:
        raise RecipeError(f"{path}: the baseline {grid.baseline!r} is none of the rows.")
    return grid


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


def compare(grid: Grid, console: Console, extra: list[str] | None = None) -> list[Cell]:
    """Run what is not finished, then write the tables; those that failed, with a log in place."""
    everything = cells(grid)
    todo = [cell for cell in everything if not cell.finished]
    console.print(f"{grid.title}: {len(everything)} runs, {len(everything) - len(todo)} finished")
    failed = list(_run_all(grid, todo, console, extra or []))
    made = tables.write(grid, everything, Path(grid.output))
    if made is not None:
        console.print(made)
        console.print(f"tables and plots: {grid.output}/table.md .html .csv, *.png")
    for cell in failed:
        console.print(f"[bold red]failed:[/] {cell.folder}, see {cell.folder}/log.txt")
    return failed


def _run_all(grid: Grid, todo: list[Cell], console: Console, extra: list[str]) -> Iterator[Cell]:
    """Run cells, one at a time on each GPU, or one at a time; those that failed."""
    devices: Queue[str] = Queue()
    for number in range(max(1, torch.cuda.device_count())):
        devices.put(str(number))

    def run(cell: Cell) -> bool:
        device = devices.get()
        try:
            return _run(grid, cell, device, extra)
        finally:
            devices.put(device)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task(grid.title, total=len(todo))
        with ThreadPoolExecutor(devices.qsize()) as pool:
            for cell, well in zip(todo, pool.map(run, todo), strict=True):
                progress.update(bar, advance=1, description=f"{cell.task}/{cell.row} {cell.seed}")
                if not well:
                    yield cell


def _run(grid: Grid, cell: Cell, device: str, extra: list[str]) -> bool:
    cell.folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = device
    with (cell.folder / "log.txt").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *arguments(grid, cell, extra)],
            env=environment, stdout=log, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    return done.returncode == 0 and cell.finished


def arguments(grid: Grid, cell: Cell, extra: list[str]) -> list[str]:
    """The command line of one run, behind `surgery`."""
    settings: list[Any] = [*grid.set, *grid.task_set.get(cell.task, [])]
    settings += [*grid.row_set.get(cell.row, []), *extra]
    settings += [f"training.seed={cell.seed}", f"output={cell.folder}"]
    resume = ["--resume"] if cell.begun else []
    return ["train", f"{cell.task}/{cell.row}", *settings, *resume]
