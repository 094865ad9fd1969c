"""Read the numbers of the finished runs of a grid, and test them against the baseline."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from surgery import RecipeError
from surgery_recipes.comparison.grid import Cell
from surgery_recipes.recipe_files import reason

LOWER_IS_BETTER = ("ter",)
SIGNIFICANT = 0.05


@dataclass
class Line:
    """The numbers of one row for one task.

    Attributes:
        task, row: which recipe.
        scores: the values of each score, one for each finished seed.
        percent, stored, trainable: as in ``surgery_recipes.run.results.Row``; equal for all seeds.
        seconds: training times, one for each finished seed.
        peak_mib: the highest peak of memory over the seeds.
        by_length: for each seed, the pairs (input length, score) of its quarters.
        better: for each score that differs significantly from the baseline's, whether it is better.
        notes: how the task computed its scores.
        made_on: the machines and versions that the runs were made with.
    """

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


def read_runs(cells: Sequence[Cell]) -> list[Line]:
    """The numbers of all finished runs, in the order of the grid."""
    found: dict[tuple[str, str], Line] = {}
    for cell in cells:
        if not cell.finished:
            continue
        file = cell.folder / "metrics.json"
        try:
            content = json.loads(file.read_bytes())
            last = content["rows"][-1]
        except (ValueError, LookupError, TypeError) as error:
            raise RecipeError(f"{file} is damaged: {reason(error)}. Run it again.") from error
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


def mark_better(lines: Sequence[Line], baseline: str) -> None:
    """Fill in ``Line.better``, against the row ``baseline`` of the same task."""
    base = {line.task: line for line in lines if line.row == baseline}
    for line in lines:
        other = base.get(line.task)
        if other is None or other is line:
            continue
        for name, values in line.scores.items():
            theirs = other.scores.get(name, [])
            if significant(values, theirs):
                gain = statistics.mean(values) - statistics.mean(theirs)
                line.better[name] = (gain < 0) == name.startswith(LOWER_IS_BETTER)


def significant(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two means over seeds differ by Welch's t-test, p < 0.05; never with one seed."""
    if min(len(ours), len(theirs)) < 2 or len({*ours, *theirs}) < 2:
        return False
    from scipy.stats import ttest_ind

    return bool(ttest_ind(ours, theirs, equal_var=False).pvalue < SIGNIFICANT)
