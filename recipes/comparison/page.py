"""Write the results of a grid as one page of HTML, with nothing to fetch and no script needed.

page.html, page.css, page.js      the frame, with style and script in it
  a tab for each task             its table, which a click on a heading sorts, and its plots
  claims                          evidence and a verdict for each
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from surgery_recipes.comparison import choices, plots
from surgery_recipes.comparison.claims import CONTRADICTED, HOLDS, UNDECIDED, Verdict
from surgery_recipes.comparison.finished_runs import Line
from surgery_recipes.comparison.grid import Cell, Choice, Grid
from surgery_recipes.comparison.reasons import data_url, pictures

CLASSES = {HOLDS: "holds", CONTRADICTED: "contradicted", UNDECIDED: "open"}


def page(
    grid: Grid,
    cells: Sequence[Cell],
    lines: Sequence[Line],
    notes: Sequence[str],
    decided: Sequence[Verdict],
) -> str:
    """Return the page of a grid's finished runs."""
    tasks = [task for task in grid.tasks if any(line.task == task for line in lines)]
    tabs, style = [], _file("page.css")
    for i, task in enumerate(tasks):
        checked = " checked" if i == 0 else ""
        tabs.append(f'<input type="radio" name="task" id="t{i}"{checked}>')
        tabs.append(f'<label for="t{i}">{escape(task)}</label>')
        style += f"#t{i}:checked~.task{i}{{display:block}}"
    if len(tasks) == 1:
        style += ".tabs>input,.tabs>label{display:none}"
    for i, task in enumerate(tasks):
        own = [line for line in lines if line.task == task]
        tabs.append(
            f'<section class="task task{i}">{_task(grid, task, own)}{_why(cells, task)}</section>'
        )
    about = notes[0] if grid.about else ""
    return Template(_file("page.html")).substitute(
        title=escape(grid.title),
        style=style,
        script=_file("page.js"),
        about=escape(about),
        tabs="".join(tabs),
        claims=_claims(decided) + _sweep(grid),
        notes="".join(f"<p>{escape(note)}</p>" for note in notes if note != about),
    )


def _file(name: str) -> str:
    return files("surgery_recipes.comparison").joinpath(name).read_text(encoding="utf-8")


def _task(grid: Grid, task: str, lines: Sequence[Line]) -> str:
    head = ["row", *grid.scores[task], "% inserted", "% stored", "trainable", "minutes", "peak MiB"]
    head += choices.columns(grid)
    heads = "".join(f'<th scope="col">{escape(name).replace("_", " ")}</th>' for name in head)
    body = "".join(_row(grid, line) for line in lines)
    table = f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody>"
    drawn = [
        plots.as_svg(panel, grid, lines, f"{task} {panel.__name__}")
        for panel, there in (
            (plots.by_parameters, any(grid.scores[task][0] in line.scores for line in lines)),
            (plots.by_length, any(line.by_length for line in lines)),
        )
        if there
    ]
    pictures = "".join(f"<div>{each}</div>" for each in drawn)
    return (
        f'<div class="scroll"><table class="sortable">{table}</table></div>'
        f'<div class="plots">{pictures}</div>'
    )


def _why(cells: Sequence[Cell], task: str) -> str:
    """The pictures of the diagnosed rows, each row folded."""
    made = []
    for row, drawn in pictures(cells, task).items():
        images = "".join(
            f'<figure><img src="{url}" alt="{escape(what)}"><figcaption>{escape(what)}</figcaption>'
            "</figure>"
            for what, url in drawn
        )
        made.append(f"<details><summary>{escape(row)}</summary>{images}</details>")
    return f"<h2>Why</h2>{''.join(made)}" if made else ""


def _row(grid: Grid, line: Line) -> str:
    special = [*grid.set, *grid.task_set.get(line.task, []), *grid.row_set.get(line.row, [])]
    chosen = grid.chosen.get(f"{line.task}/{line.row}", Choice()).set
    settings = escape("\n".join([*special, *grid.given, *chosen]), quote=True)
    cells = [f'<td title="{settings}">{escape(line.row)}</td>']
    for name in grid.scores[line.task]:
        score, paper = (
            line.scores.get(name),
            grid.paper.get(line.row, {}).get(f"{line.task}.{name}"),
        )
        beside = "" if paper is None else f"<small>paper {paper:g}</small>"
        if score is None:
            cells.append(f'<td data-value="">{beside}</td>')
            continue
        error = "" if score.error is None else f"<small>± {score.error:.2g}</small>"
        kind = {True: ' class="better"', False: ' class="worse"', None: ""}[line.better.get(name)]
        seeds = escape(", ".join(f"seed {s}: {v:.4g}" for s, v in score.seeds.items()), quote=True)
        number = f"<b>{score.mean:.4g}</b>{error}"
        cells.append(f'<td{kind} data-value="{score.mean!r}" title="{seeds}">{number}{beside}</td>')
    numbers = (
        (line.percent, f"{line.percent:.2f}"), (line.stored, f"{line.stored:.2f}"),
        (line.trainable, f"{line.trainable:,}"),
        (statistics.mean(line.seconds), f"{statistics.mean(line.seconds) / 60:.1f}"),
        (line.peak_mib, f"{line.peak_mib:.0f}" if line.peak_mib else ""),
    )  # fmt: skip
    cells += [f'<td data-value="{value!r}">{text}</td>' for value, text in numbers]
    cells += [f"<td>{escape(text)}</td>" for text in choices.cells_of(grid, line.row, [line.task])]
    return f"<tr>{''.join(cells)}</tr>"


def _sweep(grid: Grid) -> str:
    """The curves of validation against the learning rate, if it was searched."""
    file = Path(grid.output) / "sweep.png"
    if not any(choice.rate for choice in grid.chosen.values()) or not file.is_file():
        return ""
    image = f'<img src="{data_url(file)}" alt="validation against learning rate">'
    return f"<h2>Learning rates</h2><figure>{image}</figure>"


def _claims(decided: Sequence[Verdict]) -> str:
    if not decided:
        return ""
    rows = "".join(
        f"<tr><td>{escape(each.claim)}</td><td>{escape(each.evidence)}</td>"
        f'<td><span class="verdict {CLASSES.get(each.verdict, "")}">{escape(each.verdict)}</span>'
        "</td></tr>"
        for each in decided
    )
    head = "<thead><tr><th>claim</th><th>evidence</th><th>verdict</th></tr></thead>"
    return f'<h2>Claims</h2><table class="claims">{head}<tbody>{rows}</tbody></table>'
