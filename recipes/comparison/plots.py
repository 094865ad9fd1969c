"""Draw the scores of a grid against trainable numbers, and against the length of the input.

Names stand in a column at the right of a panel, each with a thin line to its point, and at least a
line's height apart: so none lies on another.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from surgery_recipes.comparison.finished_runs import Line
from surgery_recipes.comparison.grid import Grid

MARKERS = "osD^v"
SIZE = 8  # of names, in points
Panel = Callable[[Any, Grid, Sequence[Line]], None]


def by_parameters(axes: Any, grid: Grid, lines: Sequence[Line]) -> None:
    """Draw the first score of a task against trainable numbers, with standard errors."""
    task = lines[0].task
    name = grid.scores[task][0]
    points = []
    for line in (line for line in lines if name in line.scores):
        mean, error = line.scores[name].mean, line.scores[name].error or 0.0
        (mark, *_) = axes.errorbar(line.trainable, mean, yerr=error, fmt="o", capsize=2)
        points.append((line.trainable, mean, line.row, mark.get_color()))
    axes.set(xscale="log", xlabel="trainable numbers", ylabel=f"{name}, ± standard error")
    _name(axes, points)


def by_length(axes: Any, grid: Grid, lines: Sequence[Line]) -> None:
    """Draw the main score of each quarter of input lengths."""
    points = []
    for number, line in enumerate(line for line in lines if line.by_length):
        quarters = list(zip(*line.by_length, strict=True))  # seeds in each quarter
        quarters = [q for q in quarters if all(score is not None for _, score in q)]
        lengths = [statistics.mean(length for length, _ in seeds) for seeds in quarters]
        scores = [statistics.mean(score for _, score in seeds) for seeds in quarters]
        marker = MARKERS[number // 10 % len(MARKERS)]  # colours repeat after ten
        (drawn,) = axes.plot(lengths, scores, marker=marker, markersize=4)
        if lengths:
            points.append((lengths[-1], scores[-1], line.row, drawn.get_color()))
    axes.set(
        xlabel="tokens of the input, mean of each quarter", ylabel=grid.scores[lines[0].task][0]
    )
    _name(axes, points)


def draw(panel: Panel, grid: Grid, lines: Sequence[Line], path: Path) -> None:
    """Write a PNG with a panel for each task that has lines."""
    figure = _figure(panel, grid, lines)
    figure.savefig(path, dpi=120)


def as_svg(panel: Panel, grid: Grid, lines: Sequence[Line], salt: str) -> str:
    """Return the same as SVG for a page, whose text has the colour of the page's.

    Args:
        salt: makes the ids of this drawing differ from those of others on the page.
    """
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        file = io.StringIO()
        _figure(panel, grid, lines).savefig(
            file, format="svg", transparent=True, metadata={"Date": None}
        )
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace("#000000", "currentColor").replace("<g id=", "<g data-id=")


def _figure(panel: Panel, grid: Grid, lines: Sequence[Line]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    own = {task: [line for line in lines if line.task == task] for task in grid.tasks}
    own = {task: found for task, found in own.items() if found}
    figure = Figure(figsize=(7 * len(own), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (task, found) in zip(
        figure.subplots(1, len(own), squeeze=False).flat, own.items(), strict=True
    ):
        axes.set_title(task)
        panel(axes, grid, found)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _name(axes: Any, points: Sequence[tuple[float, float, str, Any]]) -> None:
    """Write the names of points at the right of a panel."""
    if not points:
        return
    axes.figure.canvas.draw()  # the scale of the axis is known from here on
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height
    step = 1.5 * SIZE * axes.figure.dpi / 72 / height  # of a line, as a part of the panel
    order = sorted(points, key=lambda point: point[1])
    places: list[float] = []
    for _, y, *_ in order:
        wanted = (y - low) / (high - low)
        places.append(max(wanted, places[-1] + step) if places else wanted)
    over = places[-1] - max(1.0, step * (len(places) - 1))
    for i in range(len(places) - 1, -1, -1):  # what stands too high goes down, and pushes others
        above = places[i + 1] - step if i + 1 < len(places) else places[i] - max(over, 0.0)
        places[i] = min(places[i], above)
    for (x, y, name, colour), place in zip(order, places, strict=True):
        axes.annotate(
            name, (x, y), xytext=(1.02, place), textcoords="axes fraction", fontsize=SIZE,
            color=colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.35, "lw": 0.7},
        )  # fmt: skip
