"""Plot the scores of a grid against trainable numbers, and against the length of the input."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery_recipes.comparison.finished_runs import Line
from surgery_recipes.comparison.grid import Grid

MARKERS = "osD^v"


def by_parameters(grid: Grid, lines: Sequence[Line], path: Path) -> None:
    """Plot the first score of each task against trainable numbers, one panel for each task."""
    figure, panels = _panels(grid)
    for task, place in panels.items():
        name = grid.scores[task][0]
        for line in (line for line in lines if line.task == task and name in line.scores):
            mean, spread = line.scores[name].mean, line.scores[name].error or 0.0
            place.errorbar(line.trainable, mean, yerr=spread, fmt="o", label=line.row)
            place.annotate(line.row, (line.trainable, mean), fontsize=8, xytext=(4, 4),
                           textcoords="offset points")  # fmt: skip
        place.set(xscale="log", xlabel="trainable numbers", ylabel=name, title=task)
        place.grid(alpha=0.3)
    _save(figure, path)


def by_length(grid: Grid, lines: Sequence[Line], path: Path) -> None:
    """Plot the main score of each quarter of input lengths, one panel for each task."""
    figure, panels = _panels(grid)
    for task, place in panels.items():
        chosen = [line for line in lines if line.task == task and line.by_length]
        for number, line in enumerate(chosen):
            quarters = list(zip(*line.by_length, strict=True))  # seeds in each quarter
            quarters = [q for q in quarters if all(score is not None for _, score in q)]
            lengths = [statistics.mean(length for length, _ in seeds) for seeds in quarters]
            scores = [statistics.mean(score for _, score in seeds) for seeds in quarters]
            marker = MARKERS[number // 10 % len(MARKERS)]  # colours repeat after ten
            place.plot(lengths, scores, marker=marker, label=line.row)
        place.set(xlabel="tokens of the input, mean of each quarter", ylabel="score", title=task)
        place.grid(alpha=0.3)
        if place.lines:
            place.legend(fontsize=7)
    _save(figure, path)


def _panels(grid: Grid) -> tuple[Any, dict[str, Any]]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(grid.tasks), figsize=(7 * len(grid.tasks), 5), squeeze=False)
    return figure, dict(zip(grid.tasks, axes.flat, strict=True))


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
