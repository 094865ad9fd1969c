"""Write the results of a grid as Markdown, HTML and CSV tables, beside their plots."""

from __future__ import annotations

import csv
import html
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from surgery_recipes.comparison import choices, plots
from surgery_recipes.comparison.finished_runs import SIGNIFICANT, Line, mark_better, read_runs
from surgery_recipes.comparison.grid import Cell, Choice, Grid

PICTURES = {
    "parameters.png": "quality against parameters",
    "length.png": "quality against input length",
    "sweep.png": "validation against learning rate",
}


def write(grid: Grid, cells: Sequence[Cell]) -> Table | None:
    """Write all tables and plots; return the table to print, or None if no run has finished."""
    lines, folder = read_runs(cells), Path(grid.output)
    if not lines:
        return None
    mark_better(lines, grid.baseline)
    head, rows = _cells(grid, lines)
    notes = _notes(grid, cells, lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(_markdown(grid.title, head, rows, notes))
    swept = any(choice.rate for choice in grid.chosen.values())
    pictures = [name for name in PICTURES if name != "sweep.png" or swept]
    (folder / "table.html").write_text(_html(grid.title, head, rows, notes, pictures))
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(_for_programs(grid, lines))
    plots.by_parameters(grid, lines, folder / "parameters.png")
    plots.by_length(grid, lines, folder / "length.png")
    shown = Table(title=Text(grid.title))
    for number, name in enumerate(head):
        shown.add_column(Text(name), no_wrap=number == 0, overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown


def _cells(grid: Grid, lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the tables that are read by people."""
    wanted = [(task, name) for task in grid.tasks for name in grid.scores[task]]
    named = len(grid.tasks) > 1
    head = ["row", "% inserted", "% stored", "trainable", "minutes", "peak MiB"]
    head += choices.columns(grid)
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
        cells += [minutes, f"{peak:.0f}" if peak else "", *choices.cells_of(grid, row, list(own))]
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
    """The rows of the CSV file: one number in each cell, one line for each task and row."""
    wanted = list(dict.fromkeys(name for task in grid.tasks for name in grid.scores[task]))
    head: list[Any] = ["task", "row", "runs", "inserted_percent", "stored_percent", "trainable"]
    head += ["minutes", "peak_mib", "learning_rate", "at_edge", "size"]
    head += [f"{name}_{what}" for name in wanted for what in ("mean", "std", "paper")]
    made = [head]
    for line in lines:
        paper = grid.paper.get(line.row, {})
        cells: list[Any] = [line.task, line.row, len(line.seconds), line.percent, line.stored]
        cells += [line.trainable, statistics.mean(line.seconds) / 60, line.peak_mib]
        chosen = grid.chosen.get(f"{line.task}/{line.row}", Choice())
        cells += [chosen.rate or "", int(chosen.edge) if chosen.rate else "", chosen.size]
        for name in wanted:
            values = line.scores.get(name, [])
            cells.append(statistics.mean(values) if values else "")
            cells.append(statistics.stdev(values) if len(values) > 1 else "")
            cells.append(paper.get(f"{line.task}.{name}", ""))
        made.append(cells)
    return made


def _number(values: Sequence[float]) -> str:
    """A mean, with its standard deviation if there are several values."""
    if not values:
        return ""
    text = f"{statistics.mean(values):.4g}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.2g}"


def _notes(grid: Grid, cells: Sequence[Cell], lines: Sequence[Line]) -> list[str]:
    """The sentences below a table: everything that its numbers depend on."""
    notes = [grid.about, f"Seeds: {', '.join(map(str, grid.seeds))}."]
    if len(grid.seeds) > 1:
        notes.append("Mean ± standard deviation over seeds.")
    if grid.baseline and len(grid.seeds) > 1:
        notes.append(
            f"* better than {grid.baseline}, Welch's t-test over seeds, p < {SIGNIFICANT}."
        )
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
    notes += choices.notes(grid, cells)
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


def _html(
    title: str, head: list[str], rows: list[list[str]], notes: list[str], pictures: list[str]
) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body: list[Any] = [line(head, "th"), *(line(row, "td") for row in rows)]
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    style = "body{font:15px sans-serif;margin:2em}td,th{border:1px solid #ccc;padding:.4em}"
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style><h1>{title}</h1><table>{''.join(body)}</table>{below}"
        + "".join(f'<img src="{name}" alt="{PICTURES[name]}">' for name in pictures)
        + "</html>\n"
    )
