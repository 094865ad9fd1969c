"""Hold the claims of a paper against the runs of a grid: the evidence, and a verdict.

claims:
  "Inducer-tuning beats prefix-tuning":
    {better: inducer, than: prefix, score: webnlg.bleu}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery_recipes.comparison.finished_runs import Line, is_better
from surgery_recipes.comparison.grid import Grid
from surgery_recipes.comparison.significance import (
    SIGNIFICANT,
    Difference,
    Score,
    difference,
    holm,
)

HOLDS, CONTRADICTED = "holds here", "contradicted here"
UNDECIDED, UNMEASURED = "not decided", "not measured"


@dataclass(frozen=True)
class Verdict:
    """A claim, what the runs say of it, and whether that is enough to decide."""

    claim: str
    evidence: str
    verdict: str


def verdicts(grid: Grid, lines: Sequence[Line]) -> list[Verdict]:
    """Return a verdict for each claim; their p are corrected together, by Holm's method."""
    found = [_compare(claim, lines) for claim in grid.claims.values()]
    ps = holm([None if each is None else each[2].p for each in found])
    return [
        _verdict(text, claim, each, p)
        for (text, claim), each, p in zip(grid.claims.items(), found, ps, strict=True)
    ]


def _compare(
    claim: dict[str, str], lines: Sequence[Line]
) -> tuple[Score, Score, Difference] | None:
    """Return the scores of the two rows of a claim, and their difference."""
    task, _, name = claim["score"].partition(".")
    rows = {
        line.row: line.scores[name] for line in lines if line.task == task and name in line.scores
    }
    if claim["better"] not in rows or claim["than"] not in rows:
        return None
    ours, theirs = rows[claim["better"]], rows[claim["than"]]
    found = difference(ours, theirs)
    return None if found is None else (ours, theirs, found)


def _verdict(
    text: str,
    claim: dict[str, str],
    found: tuple[Score, Score, Difference] | None,
    p: float | None,
) -> Verdict:
    if found is None:
        return Verdict(text, f"no runs of both with {claim['score']}", UNMEASURED)
    ours, theirs, gap = found
    evidence = (
        f"{claim['score']}: {claim['better']} {ours.mean:.4g}, {claim['than']} {theirs.mean:.4g}, "
        f"difference {gap.gain:+.3g}"
    )
    if gap.p is None or p is None:
        return Verdict(text, f"{evidence}, one seed and nothing resampled", UNDECIDED)
    evidence += f" ({gap.low:+.3g} to {gap.high:+.3g}), p {p:.2g}, seeds: {gap.seeds}"
    if p >= SIGNIFICANT:
        return Verdict(text, evidence, UNDECIDED)
    name = claim["score"].partition(".")[2]
    return Verdict(text, evidence, HOLDS if is_better(name, gap.gain) else CONTRADICTED)
