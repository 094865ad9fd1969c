"""Tables: what the finished runs of a grid show, as Markdown, HTML, CSV and pictures."""

from __future__ import annotations

import csv
import html
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from surgery_recipes import pictures

if TYPE_CHECKING:
    from surgery_recipes.grid import Cell, Grid

LOWER_IS_BETTER = ("ter",)
BELOW = 0.05


@dataclass
class Line:
    """One row of a table for one task: every finished seed's numbers, and how they were made."""

    task: str
    row: str
    scores: dict[str, list[float]] = field(default_factory=dict)
    percent: float = 0.0
    stored: float = 0.0
    trainable: int = 0
    seconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    by_length: list[list[list[float]]] = field(default_factory=list)
    better: dict[str, bool] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    made_on: set[str] = field(default_factory=set)


def write(grid: Grid, cells: Sequence[Cell]) -> Table | None:
    """Write ``table.md``, ``table.html``, ``table.csv`` and the plots; None if nothing finished."""
    lines, folder = read(cells), Path(grid.output)
    if not lines:
        return None
    _test(grid, lines)
    head, rows = _cells(grid, lines)
    notes = _notes(grid, cells, lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(_markdown(grid.title, head, rows, notes))
    (folder / "table.html").write_text(_html(grid.title, head, rows, notes))
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(_for_programs(grid, lines))
    pictures.by_parameters(grid, lines, folder / "parameters.png")
    pictures.by_length(grid, lines, folder / "length.png")
    shown = Table(title=grid.title)
    for number, name in enumerate(head):
        shown.add_column(name, no_wrap=number == 0, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def read(cells: Sequence[Cell]) -> list[Line]:
    """The numbers of all finished runs, in the order of the grid."""
    found: dict[tuple[str, str], Line] = {}
    for cell in cells:
        if not cell.finished:
            continue
        content = json.loads((cell.folder / "metrics.json").read_text())
        last = content["rows"][-1]
        line = found.setdefault((cell.task, cell.row), Line(cell.task, cell.row))
        for name, value in last["scores"].items():
            if value is not None:
                line.scores.setdefault(name, []).append(value)
        line.percent, line.trainable = last["percent"], last["trainable"]
        line.stored = last.get("stored", line.percent)
        line.notes |= content.get("notes", {})
        versions = (f"{name} {version}" for name, version in content.get("versions", {}).items())
        line.made_on.add(", ".join([content.get("machine", "unknown"), *versions]))
        line.seconds.append(last["seconds"])
        line.peak_mib = max(line.peak_mib, last.get("peak_mib", 0.0))
        if last.get("by_length"):
            line.by_length.append(last["by_length"])
    return list(found.values())


def significant(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Do the means of two sets of seeds differ (Welch's t-test, p < 0.05)? No, with one seed."""
    if min(len(ours), len(theirs)) < 2 or len({*ours, *theirs}) < 2:
        return False
    from scipy.stats import ttest_ind

    return bool(ttest_ind(ours, theirs, equal_var=False).pvalue < BELOW)


def _test(grid: Grid, lines: list[Line]) -> None:
    """Mark the scores that are better than the baseline's beyond chance."""
    base = {line.task: line for line in lines if line.row == grid.baseline}
    for line in lines:
        other = base.get(line.task)
        if other is None or other is line:
            continue
        for name, values in line.scores.items():
            theirs = other.scores.get(name, [])
            if significant(values, theirs):
                gain = statistics.mean(values) - statistics.mean(theirs)
                line.better[name] = (gain < 0) == name.startswith(LOWER_IS_BETTER)


def _cells(grid: Grid, lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    wanted = [(task, name) for task in grid.tasks for name in grid.scores[task]]
    named = len(grid.tasks) > 1
    head = ["row", "% inserted", "% stored", "trainable", "minutes", "peak MiB"]
    for task, name in wanted:
        head += [f"{task} {name}" if named else name]
        if any(f"{task}.{name}" in numbers for numbers in grid.paper.values()):
            head += ["paper"]
    rows = []
    for row in grid.rows:
        own = {line.task: line for line in lines if line.row == row}
        if not own:
            continue
        first = next(iter(own.values()))
        minutes = " + ".join(f"{statistics.mean(line.seconds) / 60:.1f}" for line in own.values())
        peak = max(line.peak_mib for line in own.values())
        cells = [row, f"{first.percent:.2f}", f"{first.stored:.2f}", f"{first.trainable:,}"]
        cells += [minutes, f"{peak:.0f}" if peak else ""]
        for task, name in wanted:
            values = own[task].scores.get(name, []) if task in own else []
            mark = "*" if values and own[task].better.get(name) else ""
            few = f" (n={len(values)})" if 0 < len(values) < len(grid.seeds) else ""
            cells.append(_number(values) + mark + few)
            if any(f"{task}.{name}" in numbers for numbers in grid.paper.values()):
                cells.append(str(grid.paper.get(row, {}).get(f"{task}.{name}", "")))
        rows.append(cells)
    return head, rows


def _for_programs(grid: Grid, lines: list[Line]) -> list[list[Any]]:
    """The same for programs: one number in each cell, one line for each task and row."""
    wanted = list(dict.fromkeys(name for task in grid.tasks for name in grid.scores[task]))
    head: list[Any] = ["task", "row", "runs", "inserted_percent", "stored_percent", "trainable"]
    head += ["minutes", "peak_mib"]
    head += [f"{name}_{what}" for name in wanted for what in ("mean", "std", "paper")]
    made = [head]
    for line in lines:
        paper = grid.paper.get(line.row, {})
        cells: list[Any] = [line.task, line.row, len(line.seconds), line.percent, line.stored]
        cells += [line.trainable, statistics.mean(line.seconds) / 60, line.peak_mib]
        for name in wanted:
            values = line.scores.get(name, [])
            cells.append(statistics.mean(values) if values else "")
            cells.append(statistics.stdev(values) if len(values) > 1 else "")
            cells.append(paper.get(f"{line.task}.{name}", ""))
        made.append(cells)
    return made


def _number(values: Sequence[float]) -> str:
    if not values:
        return ""
    text = f"{statistics.mean(values):.4g}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.2g}"


def _notes(grid: Grid, cells: Sequence[Cell], lines: Sequence[Line]) -> list[str]:
    """All that the numbers depend on."""
    notes = [grid.about, f"Seeds: {', '.join(map(str, grid.seeds))}."]
    if len(grid.seeds) > 1:
        notes.append("Mean ± standard deviation over seeds.")
    if grid.baseline and len(grid.seeds) > 1:
        notes.append(f"* better than {grid.baseline}, Welch's t-test over seeds, p < {BELOW}.")
    missing = ", ".join(str(cell) for cell in cells if not cell.finished)
    notes += [f"Not finished: {missing}."] if missing else []
    notes += [f"Parameters: of {grid.tasks[0]}."] if len(grid.tasks) > 1 else []
    for task, names in grid.scores.items():
        own = [line for line in lines if line.task == task]
        for name in names:
            if own and not any(name in line.scores for line in own):
                why = own[0].notes.get(name.partition("_")[0], "the task does not give it")
                notes.append(f"No {task} {name}: {why}.")
        notes += [f"{task} {name}: {note}" for name, note in (own[0].notes if own else {}).items()]
    special = {"all": grid.set, **grid.task_set, **grid.row_set, "command line": grid.given}
    changed = [f"{name}: {' '.join(texts)}" for name, texts in special.items() if texts]
    if changed:
        notes.append("Settings other than the recipes': " + "; ".join(changed) + ".")
    notes.append("Each row: `surgery train TASK/ROW training.seed=SEED`, with these settings.")
    notes.append("Made on: " + "; ".join(sorted(set().union(*(x.made_on for x in lines)))) + ".")
    return [note for note in notes if note]


def _markdown(title: str, head: list[str], rows: list[list[str]], notes: list[str]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join([f"# {title}", "", *lines, "", *(f"{note}\n" for note in notes)])


def _html(title: str, head: list[str], rows: list[list[str]], notes: list[str]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body: list[Any] = [line(head, "th"), *(line(row, "td") for row in rows)]
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    style = "body{font:15px sans-serif;margin:2em}td,th{border:1px solid #ccc;padding:.4em}"
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style><h1>{title}</h1><table>{''.join(body)}</table>{below}"
        '<img src="parameters.png" alt="quality against parameters">'
        '<img src="length.png" alt="quality against input length"></html>\n'
    )
