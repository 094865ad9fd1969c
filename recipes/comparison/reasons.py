"""Diagnose one run of each row of a grid, and read the pictures for its page."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path

from surgery_recipes.comparison.grid import Cell

PICTURES = {
    "mass.png": "attention to virtual keys",
    "updates.png": "updates",
    "lengths.png": "score by length of the input",
}
WHOLE = "fine_tuning"  # the row whose score is subtracted


def diagnose_rows(cells: Sequence[Cell], command: Callable[[list[str], Path], bool]) -> list[Cell]:
    """Diagnose the first finished run of each row, if that has not been done.

    Args:
        command: runs ``surgery`` with arguments, in a process that logs to a file; whether it went
            well.

    Returns:
        The runs that could not be diagnosed.
    """
    failed = []
    first = _first(cells)
    for (task, row), cell in first.items():
        if (cell.folder / "diagnosis" / "losses.csv").is_file():
            continue
        whole = first.get((task, WHOLE))
        minus = ["--minus", str(whole.folder)] if whole and row != WHOLE else []
        if not command(["diagnose", str(cell.folder), *minus], cell.folder / "diagnosis.txt"):
            failed.append(cell)
    return failed


def pictures(cells: Sequence[Cell], task: str) -> dict[str, list[tuple[str, str]]]:
    """Return for each diagnosed row of a task its pictures: what each shows, and a data URL."""
    found: dict[str, list[tuple[str, str]]] = {}
    for (of, row), cell in _first(cells).items():
        for name, what in PICTURES.items():
            file = cell.folder / "diagnosis" / name
            if of == task and file.is_file():
                found.setdefault(row, []).append((what, data_url(file)))
    return found


def data_url(file: Path) -> str:
    """A picture as a part of a page."""
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def _first(cells: Sequence[Cell]) -> dict[tuple[str, str], Cell]:
    """The first finished run of each task and row."""
    found: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        if cell.finished:
            found.setdefault((cell.task, cell.row), cell)
    return found
