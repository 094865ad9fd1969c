"""Run the recipes of a grid, and write tables and plots.

Each run is a process of its own, ``surgery train TASK/ROW``, in the folder OUTPUT/TASK/ROW/SEED. A
finished run is not repeated, and an unfinished one continues from its checkpoint, both only if they
had the settings that the grid has now.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from rich.console import Console
from rich.text import Text

from surgery import RecipeError
from surgery_recipes.comparison import duration, search, sweep_report, tables
from surgery_recipes.comparison.budgets import within_budget
from surgery_recipes.comparison.grid import Cell, Grid, cells, check
from surgery_recipes.comparison.reasons import diagnose_rows
from surgery_recipes.comparison.titles import titled
from surgery_recipes.comparison.workers import Workers, gpus, run_surgery


def run_grid(
    grid: Grid,
    console: Console,
    trust: bool = False,
    sweep: bool = False,
    wide: bool = False,
    diagnosed: bool = False,
    within: float | None = None,
) -> list[Cell]:
    """Run what is not finished, then write the tables.

    Args:
        grid: what to run.
        console: where to say how far it is.
        trust: whether the package of ``model: package:NAME`` may be imported, whatever it is.
        sweep: whether to choose the learning rate of each row first, as ``grid.sweep`` says.
        wide: print all columns of the table.
        diagnosed: diagnose one run of each row, for the page.
        within: seconds that the runs shall take; they get fewer steps if they would take more.

    Returns:
        The cells whose runs failed. The folder of each has a ``log.txt``.

    Raises:
        RecipeError: some run would fail. None has been started.
    """
    title, grid = grid.title, titled(grid)
    everything = cells(grid)
    if (grid.baseline or grid.claims) and importlib.util.find_spec("scipy") is None:
        raise RecipeError("a baseline or claims need scipy. pip install 'surgery[recipes]'")
    if grid.budget is not None:
        grid = within_budget(grid, console, trust)
    lost: list[Cell] = []
    if sweep:
        search.check_sweep(grid, trust)
        found = search.search(grid, console, trust)
        sweep_report.write(grid, found)
        console.print(Text(f"trials: {grid.output}/{sweep_report.CSV}, {sweep_report.PLOT}"))
        lost = search.without_rate(found, everything)
        grid = search.choose(grid, found)
        everything = [cell for cell in everything if cell not in lost]
    check(grid, everything, trust)
    todo = [cell for cell in everything if not cell.finished]
    done = len(everything) - len(todo)
    if todo:
        grid = _told(grid, todo, console, trust, within)
        grid = titled(dataclasses.replace(grid, title=title))
    console.print(Text(f"{grid.title}: {len(everything)} runs, {done} finished"))
    failed = []
    if todo:
        with Workers(grid, console, trust, grid.title, len(todo)) as workers:
            failed = workers.run(todo)
    unknown = []
    if diagnosed:
        with console.status("diagnosing a run of each row"):
            unknown = diagnose_rows(everything, lambda words, log: run_surgery(words, log, trust))
    made = tables.write(grid, everything, wide)
    if made is not None:
        console.print(made)
        console.print(Text(f"tables and plots: {grid.output}/table.md .html .csv, *.png"))
    for cell in unknown:
        console.print(Text(f"not diagnosed: {cell.folder}, see {cell.folder}/diagnosis.txt"))
    for cell in failed:
        said = f"failed: {cell.folder}, see {cell.folder}/log.txt"
        console.print(Text(said, style="bold red"))
    for cell in lost:
        where = Path(grid.output) / "sweep" / cell.task / cell.row
        said = f"not run: {cell}, as all of its trials failed, see {where}"
        console.print(Text(said, style="bold red"))
    return failed + lost


def _told(
    grid: Grid, todo: list[Cell], console: Console, trust: bool, within: float | None
) -> Grid:
    """Say about how long the runs take; return the grid whose runs fit the time that is given."""
    with console.status("timing a few steps of each task"):
        found = duration.costs(grid, todo, trust)
    workers = len(gpus()) or 1
    about = duration.total(found, todo, workers)
    if not about:
        return grid
    console.print(
        Text(f"about {duration.shown(about)} on this machine, without validations in training")
    )
    if within is None:
        return grid
    grid = duration.fitted(grid, found, todo, workers, within)
    check(grid, todo, trust)
    return grid
