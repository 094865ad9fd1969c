"""Write what a sweep found: ``sweep.csv`` with every trial, and ``sweep.png`` with the curves."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery_recipes.comparison.grid import Grid
from surgery_recipes.comparison.search import Found, Pair

CSV, PLOT = "sweep.csv", "sweep.png"
HEAD = ("task", "row", "rate", "seed", "steps", "name", "score", "chosen", "note")
MARKERS = "osD^vPX"


def write(grid: Grid, found: Mapping[Pair, Found]) -> None:
    """Write both files into the folder of the grid."""
    folder = Path(grid.output)
    with (folder / CSV).open("w", newline="") as file:
        csv.writer(file).writerows([HEAD, *_lines(found)])
    figure = draw(grid, found)
    figure.savefig(folder / PLOT, dpi=120, bbox_inches="tight")
    from matplotlib import pyplot as plt

    plt.close(figure)


def _lines(found: Mapping[Pair, Found]) -> list[tuple[Any, ...]]:
    return [
        (
            task, row, repr(one.rate), one.seed, one.steps, score.name,
            score.value if score.good else "", int(one.rate == made.rate), score.why,
        )
        for (task, row), made in found.items()
        for trials in made.rounds
        for one, score in trials
    ]  # fmt: skip


def draw(grid: Grid, found: Mapping[Pair, Found]) -> Any:
    """Draw validation against the rate, a panel for each task; a ring marks the chosen rate.

    Rounds of a halving sweep are lines of their own, the early ones dotted: their trials had fewer
    steps, so their scores do not compare with those of the last round.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tasks = [task for task in grid.tasks if any(pair[0] == task for pair in found)]
    size = (8 * max(1, len(tasks)), 5)
    figure, axes = plt.subplots(1, max(1, len(tasks)), figsize=size, squeeze=False)
    for task, place in zip(tasks, axes.flat, strict=False):
        name = ""
        own = [(row, made) for (of, row), made in found.items() if of == task]
        for number, (row, made) in enumerate(own):
            name = name or made.score_name
            style = {"color": f"C{number % 10}", "marker": MARKERS[number // 10 % len(MARKERS)]}
            for index, trials in enumerate(made.rounds):
                means, last = made.means(index), index == len(made.rounds) - 1
                label = f"{row}: {made.rate:g}" if made.rate else f"{row}: no rate"
                if means or last:
                    place.plot(
                        list(means), list(means.values()), linestyle="-" if last else ":",
                        alpha=1.0 if last else 0.4, label=label if last else None, **style,
                    )  # fmt: skip
                if last and made.rate and trials:
                    place.plot(made.rate, means[made.rate], "o", markersize=13, fillstyle="none",
                               color=style["color"])  # fmt: skip
        place.set(xscale="log", xlabel="learning rate", ylabel=f"validation {name}", title=task)
        place.grid(alpha=0.3)
        place.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), title="row: best")
    figure.tight_layout()
    return figure
