"""Run the recipes of a grid, one at a time or one on each GPU, and write tables and plots.

Each run is a process of its own, ``surgery train TASK/ROW``, in the folder OUTPUT/TASK/ROW/SEED. A
finished run is not repeated, and an unfinished one continues from its checkpoint, both only if they
had the settings that the grid has now.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from surgery import RecipeError
from surgery_recipes.comparison import tables
from surgery_recipes.comparison.grid import Cell, Grid, cells, check, settings
from surgery_recipes.comparison.reasons import diagnose_rows
from surgery_recipes.comparison.titles import titled

# Python puts the current folder in front of all others: a file there could pass for a library.
COMMAND = "import sys; sys.path[:] = filter(None, sys.path); from surgery.cli import app; app()"
GPUS = "CUDA_VISIBLE_DEVICES"


def run_grid(
    grid: Grid,
    console: Console,
    trust: bool = False,
    wide: bool = False,
    diagnosed: bool = False,
) -> list[Cell]:
    """Run what is not finished, then write the tables.

    Args:
        grid: what to run.
        console: where to say how far it is.
        trust: whether the package of ``model: package:NAME`` may be imported, whatever it is.
        wide: print all columns of the table.
        diagnosed: diagnose one run of each row, for the page.

    Returns:
        The cells whose runs failed. The folder of each has a ``log.txt``.

    Raises:
        RecipeError: some run would fail. None has been started.
    """
    grid = titled(grid)
    everything = cells(grid)
    if (grid.baseline or grid.claims) and importlib.util.find_spec("scipy") is None:
        raise RecipeError("a baseline or claims need scipy. pip install 'surgery[recipes]'")
    check(grid, everything, trust)
    todo = [cell for cell in everything if not cell.finished]
    done = len(everything) - len(todo)
    console.print(Text(f"{grid.title}: {len(everything)} runs, {done} finished"))
    failed = list(_run_all(grid, todo, console, trust)) if todo else []
    unknown = []
    if diagnosed:
        with console.status("diagnosing a run of each row"):
            unknown = diagnose_rows(everything, lambda words, log: _surgery(words, log, trust))
    made = tables.write(grid, everything, wide)
    if made is not None:
        console.print(made)
        console.print(Text(f"tables and plots: {grid.output}/table.md .html .csv, *.png"))
    for cell in unknown:
        console.print(Text(f"not diagnosed: {cell.folder}, see {cell.folder}/diagnosis.txt"))
    for cell in failed:
        said = f"failed: {cell.folder}, see {cell.folder}/log.txt"
        console.print(Text(said, style="bold red"))
    return failed


def gpus() -> list[str]:
    """The GPUs that this process may use, by the names that its environment gives them."""
    count, allowed = torch.cuda.device_count(), os.environ.get(GPUS)
    names = map(str, range(count)) if allowed is None else allowed.split(",")
    return [name.strip() for name in names][:count]


def _run_all(grid: Grid, todo: list[Cell], console: Console, trust: bool) -> Iterator[Cell]:
    """Run cells, one at a time on each GPU or in all; yield those that failed."""
    devices: Queue[str] = Queue()
    for name in gpus() or [""]:
        devices.put(name)

    def run(cell: Cell) -> bool:
        device = devices.get()
        try:
            return _run(grid, cell, device, trust)
        finally:
            devices.put(device)

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task(grid.title, total=len(todo))
        with ThreadPoolExecutor(devices.qsize()) as pool:
            for cell, well in zip(todo, pool.map(run, todo), strict=True):
                progress.update(bar, advance=1, description=str(cell))
                if not well:
                    yield cell


def _run(grid: Grid, cell: Cell, device: str, trust: bool) -> bool:
    """Run one cell in a process of its own; whether it finished."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    flags = ["--resume" if cell.begun else "--overwrite"]
    words = ["train", f"{cell.task}/{cell.row}", *settings(grid, cell), *flags]
    return _surgery(words, cell.folder / "log.txt", trust, device) and cell.finished


def _surgery(words: list[str], log: Path, trust: bool, device: str = "") -> bool:
    """Run a command of ``surgery`` in a process of its own; whether it went well."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "SURGERY_TRACEBACK": "1"}
    environment |= {GPUS: device} if device else {}
    words = [*words, *(["--trust"] if trust else [])]
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *words],
            env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            check=False,
        )  # fmt: skip
    return done.returncode == 0
