"""Read the numbers of the finished runs of a grid, and test them against the baseline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from surgery import RecipeError
from surgery_recipes.comparison.grid import Cell
from surgery_recipes.comparison.significance import (
    SIGNIFICANT,
    Difference,
    Score,
    difference,
    holm,
)
from surgery_recipes.recipe_files import reason
from surgery_recipes.run import read_resampled

LOWER_IS_BETTER = ("ter",)


@dataclass
class Line:
    """The numbers of one row for one task.

    Attributes:
        task, row: which recipe.
        scores: each score, of all finished seeds.
        percent, stored, trainable: as in ``surgery_recipes.run.results.Row``; equal for all seeds.
        seconds: training times, one for each finished seed.
        peak_mib: the highest peak of memory over the seeds.
        by_length: for each seed, the pairs (input length, score) of its quarters.
        against: the difference of each score from the baseline's.
        better: for each score that differs significantly from the baseline's, whether it is better.
        notes: how the task computed its scores.
        made_on: the machines and versions that the runs were made with.
    """

    task: str
    row: str
    scores: dict[str, Score] = field(default_factory=dict)
    percent: float = 0.0
    stored: float = 0.0
    trainable: int = 0
    seconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    by_length: list[list[list[float]]] = field(default_factory=list)
    against: dict[str, Difference] = field(default_factory=dict)
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
        resampled = read_resampled(cell.folder)
        for name, value in last["scores"].items():
            if value is not None:
                score = line.scores.setdefault(name, Score())
                score.seeds[cell.seed] = value
                if name in resampled:
                    score.resampled[cell.seed] = resampled[name]["values"]
                    score.examples = resampled[name]["examples"]
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


def mark_better(lines: Sequence[Line], baseline: str, shown: Iterable[tuple[str, str]]) -> None:
    """Fill in ``against`` and ``better``, against the row ``baseline`` of the same task.

    Args:
        shown: the tasks and scores that are tested, all together by Holm's method.
    """
    base = {line.task: line for line in lines if line.row == baseline}
    tests = []
    for task, name in shown:
        for line in lines:
            other = base.get(task)
            if line.task != task or other in (None, line):
                continue
            assert other is not None
            if name in line.scores and name in other.scores:
                found = difference(line.scores[name], other.scores[name])
                if found is not None:
                    line.against[name] = found
                    tests.append((line, name, found))
    for (line, name, found), p in zip(tests, holm([t[2].p for t in tests]), strict=True):
        if p is not None and p < SIGNIFICANT:
            line.better[name] = is_better(name, found.gain)


def is_better(score: str, gain: float) -> bool:
    """Whether a score that differs by ``gain`` is the better one."""
    return (gain < 0) == score.startswith(LOWER_IS_BETTER)
