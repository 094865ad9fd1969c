"""Score the answers of a run against the length of their inputs, with bootstrap bands."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import surgery
from surgery import Example
from surgery_recipes.run import draws

BINS, FEW = 10, 5


@dataclass(frozen=True)
class Bin:
    """The score of one tenth of the examples, from the shortest inputs to the longest.

    Attributes:
        tokens: the mean length of the inputs.
        examples: how many.
        score: the main score of the task.
        low, high: of 95 of 100 resamples of these examples.
    """

    tokens: float
    examples: int
    score: float
    low: float
    high: float


def by_length(
    task: surgery.Task,
    lengths: Sequence[int],
    answers: Sequence[Any],
    examples: Sequence[Example],
    minus: Sequence[Any] | None = None,
) -> list[Bin]:
    """Return ten bins, fewer where ten would hold less than five examples each.

    Args:
        minus: answers of another run to the same examples, whose score is subtracted.
    """
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    count = max(1, min(BINS, len(order) // FEW))
    found = []
    for i in range(count):
        part = order[i * len(order) // count : (i + 1) * len(order) // count]
        values = sorted(
            _score(task, [part[j] for j in chosen], answers, examples, minus)
            for chosen in draws(len(part))
        )
        cut = len(values) // 40  # 2.5 % at either end
        found.append(
            Bin(
                statistics.mean(lengths[j] for j in part),
                len(part),
                _score(task, part, answers, examples, minus),
                values[cut],
                values[-1 - cut],
            )
        )
    return found


def _score(
    task: surgery.Task,
    chosen: Sequence[int],
    answers: Sequence[Any],
    examples: Sequence[Example],
    minus: Sequence[Any] | None,
) -> float:
    own = [examples[i] for i in chosen]
    score = task.main_score([answers[i] for i in chosen], own)
    return score - (task.main_score([minus[i] for i in chosen], own) if minus else 0.0)
