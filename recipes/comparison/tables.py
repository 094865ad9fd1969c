"""Write the results of a grid as Markdown, as a page and as CSV, beside their plots."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from surgery_recipes.comparison import choices, plots
from surgery_recipes.comparison.claims import Verdict, verdicts
from surgery_recipes.comparison.finished_runs import Line, mark_better, read_runs
from surgery_recipes.comparison.grid import Cell, Choice, Grid
from surgery_recipes.comparison.page import page
from surgery_recipes.comparison.significance import SIGNIFICANT, Score

MARKS = {True: "*", False: "†", None: ""}
MEASURES = ("mean", "std", "error", "gain", "gain_error", "gain_p", "effect", "paper")
LEFT_OUT = ("% stored", "trainable", "minutes", "peak MiB", "paper")  # of a narrow table
WIDTH = 80
CLAIMS = ["claim", "evidence", "verdict"]


def write(grid: Grid, cells: Sequence[Cell], wide: bool = False) -> Table | None:
    """Write all tables and plots; return the table to print, or None if no run has finished.

    Args:
        wide: print all columns instead of the row, its share of parameters and its scores.
    """
    lines, folder = read_runs(cells), Path(grid.output)
    if not lines:
        return None
    wanted = [(task, name) for task in grid.tasks for name in grid.scores[task]]
    mark_better(lines, grid.baseline, wanted)
    head, rows = _cells(grid, lines)
    notes, decided = _notes(grid, cells, lines), verdicts(grid, lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(_markdown(grid.title, head, rows, notes, decided))
    (folder / "table.html").write_text(page(grid, cells, lines, notes, decided))
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(_for_programs(grid, lines))
    plots.draw(plots.by_parameters, grid, lines, folder / "parameters.png")
    plots.draw(plots.by_length, grid, lines, folder / "length.png")
    return _for_terminal(grid.title, head, rows, wide)


def _for_terminal(title: str, head: list[str], rows: list[list[str]], wide: bool) -> Table:
    """The table that is printed: the row and its scores, as many columns as 80 characters take."""
    widths = [3 + max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    first = [i for i, name in enumerate(head) if name not in LEFT_OUT]
    chosen, room = list[int](), WIDTH - 1
    for i in [*range(len(head))] if wide else first:
        room -= widths[i]
        if room >= 0 or wide or len(chosen) < 2:
            chosen.append(i)
    more = len(head) - len(chosen)
    caption = f"{more} more columns: --wide, table.csv, table.html" if more else None
    shown = Table(title=Text(title), caption=caption)
    for i in chosen:
        shown.add_column(Text(head[i]), no_wrap=i == 0, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(row[i]) for i in chosen))
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
            score = own[task].scores.get(name) if task in own else None
            mark = MARKS[own[task].better.get(name)] if score else ""
            seeds = len(score.seeds) if score else 0
            few = f" (n={seeds})" if 0 < seeds < len(grid.seeds) else ""
            cells.append(_number(score) + mark + few)
            if any(f"{task}.{name}" in numbers for numbers in grid.paper.values()):
                cells.append(str(grid.paper.get(row, {}).get(f"{task}.{name}", "")))
        rows.append(cells)
    return head, rows


def _for_programs(grid: Grid, lines: list[Line]) -> list[list[Any]]:
    """The rows of the CSV file: one number in each cell, one line for each task and row."""
    wanted = list(dict.fromkeys(name for task in grid.tasks for name in grid.scores[task]))
    head: list[Any] = ["task", "row", "runs", "inserted_percent", "stored_percent", "trainable"]
    head += ["minutes", "peak_mib", "learning_rate", "at_edge", "size"]
    head += [f"{name}_{what}" for name in wanted for what in MEASURES]
    made = [head]
    for line in lines:
        paper = grid.paper.get(line.row, {})
        cells: list[Any] = [line.task, line.row, len(line.seconds), line.percent, line.stored]
        cells += [line.trainable, statistics.mean(line.seconds) / 60, line.peak_mib]
        chosen = grid.chosen.get(f"{line.task}/{line.row}", Choice())
        cells += [chosen.rate or "", int(chosen.edge) if chosen.rate else "", chosen.size]
        for name in wanted:
            score, gap = line.scores.get(name, Score()), line.against.get(name)
            cells.append(score.mean if score.values else "")
            cells.append(statistics.stdev(score.values) if len(score.values) > 1 else "")
            cells.append(score.error)
            cells += [gap.gain, gap.error, gap.p, gap.effect] if gap else [""] * 4
            cells.append(paper.get(f"{line.task}.{name}", ""))
        made.append(cells)
    return made


def _number(score: Score | None) -> str:
    """A mean, with its standard error if something tells it."""
    if score is None:
        return ""
    text = f"{score.mean:.4g}"
    return text if score.error is None else f"{text} ± {score.error:.2g}"


def _notes(grid: Grid, cells: Sequence[Cell], lines: Sequence[Line]) -> list[str]:
    """The sentences below a table: everything that its numbers depend on."""
    notes = [grid.about, f"Seeds: {', '.join(map(str, grid.seeds))}."]
    notes += _about_errors(grid, lines)
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


def _about_errors(grid: Grid, lines: Sequence[Line]) -> list[str]:
    """The sentences about standard errors and tests, as far as there are any."""
    scores = [score for line in lines for score in line.scores.values()]
    parts = {
        "seeds": any(len(score.seeds) > 1 for score in scores),
        "examples": any(score.resampled for score in scores),
    }
    over = " and ".join(name for name, there in parts.items() if there)
    if not over:
        return []
    notes = [f"± standard error, over {over}."]
    marked = {line.better[name] for line in lines for name in line.better}
    if grid.baseline and any(line.against for line in lines):
        said = [f"{MARKS[m]} {'better' if m else 'worse'} than {grid.baseline}" for m in marked]
        test = f"paired by seeds and examples, p < {SIGNIFICANT} corrected by Holm's method"
        none = f"No difference from {grid.baseline} is significant"
        notes.append(f"{'; '.join(sorted(said)) or none}: {test}.")
    return notes


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    head, *rows = cells
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def _markdown(
    title: str,
    head: list[str],
    rows: list[list[str]],
    notes: list[str],
    decided: Sequence[Verdict],
) -> str:
    lines = [f"# {title}", "", *_table([head, *rows]), "", *(f"{note}\n" for note in notes)]
    if decided:
        claims = [[each.claim, each.evidence, each.verdict] for each in decided]
        lines += ["## Claims", "", *_table([CLAIMS, *claims]), ""]
    return "\n".join(lines)
