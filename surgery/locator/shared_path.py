"""Count what two paths of modules have in common."""

from __future__ import annotations

import itertools


def shared(a: str, b: str) -> int:
    """Return how many modules two paths share, from the model on."""
    steps = zip(a.split("."), b.split("."), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], steps)))
