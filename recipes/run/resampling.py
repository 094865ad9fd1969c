"""Score resamples of the examples, which tells how much a score depends on the examples.

    S_r = score(examples drawn n times with replacement), r = 1 ... 200

The draws depend on n alone. Runs that scored the same examples therefore have the same draws, and
the difference of their S_r is a paired bootstrap (Efron and Tibshirani 1993, chapter 8).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import surgery
from surgery import Example
from surgery_recipes.recipe_files import write_whole

DRAWS = 200
FILE = "resampled.json"


def draws(count: int) -> Iterator[list[int]]:
    """The numbers of the examples in each resample of ``count`` examples."""
    for row in np.random.default_rng(0).integers(count, size=(DRAWS, count)):
        yield row.tolist()


def resampled(
    task: surgery.Task, answers: Sequence[Any], examples: Sequence[Example]
) -> dict[str, dict[str, Any]]:
    """Return for each score its ``values``, one for each resample, and ``examples``, their number.

    A task whose ``score`` is slow may offer ``score_resamples(answers, examples, draws)``, which
    gives the same numbers from statistics of each example; it may leave out scores. A score that a
    resample does not have is left out.
    """
    quick = getattr(task, "score_resamples", None)
    if quick is not None:
        found: dict[str, list[float]] = quick(answers, examples, list(draws(len(examples))))
    else:
        found = {}
        for chosen in draws(len(examples)):
            one = task.score([answers[i] for i in chosen], [examples[i] for i in chosen])
            for name, value in one.items():
                found.setdefault(name, []).append(value)
    return {
        name: {"examples": len(examples), "values": values}
        for name, values in found.items()
        if len(values) == DRAWS
    }


def write_resampled(folder: Path, scores: dict[str, dict[str, Any]]) -> None:
    """Write ``resampled.json``."""
    write_whole(folder / FILE, json.dumps(scores))


def read_resampled(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what :func:`write_resampled` wrote; nothing of a run that is older than it."""
    try:
        found = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
