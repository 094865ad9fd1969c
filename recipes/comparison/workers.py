"""Run cells of a grid, each in a process of its own: one at a time, or one on each GPU.

A cell is ``surgery train TASK/ROW`` with its settings. It writes into its folder, where ``log.txt``
has what it said.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from surgery_recipes.comparison.grid import Cell, Grid, settings

# Python puts the current folder in front of all others: a file there could pass for a library.
COMMAND = "import sys; sys.path[:] = filter(None, sys.path); from surgery.cli import app; app()"
GPUS = "CUDA_VISIBLE_DEVICES"


def gpus() -> list[str]:
    """The GPUs that this process may use, by the names that its environment gives them."""
    count, allowed = torch.cuda.device_count(), os.environ.get(GPUS)
    names = map(str, range(count)) if allowed is None else allowed.split(",")
    return [name.strip() for name in names][:count]


class Workers:
    """A context that runs cells and shows how far they are and how long the rest takes.

    Args:
        grid: the grid whose cells they are.
        console: where the progress is shown.
        trust: whether the package of ``model: package:NAME`` may be imported, whatever it is.
        title: what the progress is of.
        total: the sum of the cells' ``steps`` that will be run.
    """

    def __init__(self, grid: Grid, console: Console, trust: bool, title: str, total: int) -> None:
        self.grid, self.trust = grid, trust
        columns = (TextColumn("{task.description}", markup=False), BarColumn())
        more = (MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, *more, console=console)
        self.total = total
        self.bar = self.progress.add_task(title, total=total)

    def __enter__(self) -> Workers:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def skip(self, done: Sequence[Cell]) -> None:
        """Leave cells out of the count that were run before: they take no time."""
        self.total -= sum(cell.steps for cell in done)
        self.progress.update(self.bar, total=self.total)

    def run(self, todo: Sequence[Cell]) -> list[Cell]:
        """Run cells; return those that failed."""
        devices: Queue[str] = Queue()
        for name in gpus() or [""]:
            devices.put(name)

        def run(cell: Cell) -> bool:
            device = devices.get()
            try:
                return run_cell(self.grid, cell, device, self.trust)
            finally:
                devices.put(device)

        failed = []
        with ThreadPoolExecutor(devices.qsize()) as pool:
            for cell, well in zip(todo, pool.map(run, todo), strict=True):
                self.progress.update(self.bar, advance=cell.steps, description=str(cell))
                if not well:
                    failed.append(cell)
        return failed


def run_cell(grid: Grid, cell: Cell, device: str, trust: bool) -> bool:
    """Run one cell in a process of its own; whether it finished."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    flag = "--resume" if cell.begun else "--overwrite"
    words = ["train", f"{cell.task}/{cell.row}", *settings(grid, cell), flag]
    return run_surgery(words, cell.folder / "log.txt", trust, device) and cell.finished


def run_surgery(words: Sequence[str], log: Path, trust: bool, device: str = "") -> bool:
    """Run a command of ``surgery`` in a process of its own; whether it went well."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "SURGERY_TRACEBACK": "1"}
    environment |= {GPUS: device} if device else {}
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *words, *(["--trust"] if trust else [])],
            env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            check=False,
        )  # fmt: skip
    return done.returncode == 0
