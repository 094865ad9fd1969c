"""Say how sure a difference of two rows is: over seeds, and over the examples that were scored.

    d_s      the difference with seed s, of runs with the same seed and the same examples
    D_r      the mean of d over the seeds, with the r-th resample of the examples
    error^2  = var_s(d_s) / S + var_r(D_r)          what other seeds, and other examples, would do
    t        = mean_s(d_s) / error                  Student's t, degrees of freedom by Satterthwaite

The two parts are those of a crossed design, seeds x examples (McCullagh 2000): both count the noise
that seeds and examples have together, so the error is a little too large, never too small. With one
seed the first part is unknown, and the result says nothing of other seeds.

A table holds many tests, so their p are corrected by Holm's method (1979).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SIGNIFICANT = 0.05


@dataclass
class Score:
    """One score of one row.

    Attributes:
        seeds: its value with each seed.
        resampled: its values over resamples of the examples, with each seed.
        examples: how many were scored.
    """

    seeds: dict[int, float] = field(default_factory=dict)
    resampled: dict[int, list[float]] = field(default_factory=dict)
    examples: int = 0

    @property
    def values(self) -> list[float]:
        """The values, in the order of the seeds."""
        return list(self.seeds.values())

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def error(self) -> float | None:
        """The standard error of the mean, over seeds and examples; None if nothing tells it."""
        return _errors(self.seeds, self.resampled)[2]


@dataclass(frozen=True)
class Difference:
    """The difference of two rows in one score, positive where the first is higher.

    Attributes:
        gain: the mean over the seeds that both have.
        error: its standard error; None if there is one seed and no resample.
        p: two-sided, of no difference; None as above.
        low, high: an interval that holds the difference in 95 of 100 such comparisons.
        effect: the gain over the standard deviation of the seeds' differences, Cohen's d; None with
            one seed.
        seeds: how many.
    """

    gain: float
    error: float | None
    p: float | None
    low: float
    high: float
    effect: float | None
    seeds: int


def difference(ours: Score, theirs: Score) -> Difference | None:
    """Compare two scores with the same seeds and examples; None if they have no seed in common."""
    common = [seed for seed in ours.seeds if seed in theirs.seeds]
    if not common:
        return None
    gains = {seed: ours.seeds[seed] - theirs.seeds[seed] for seed in common}
    both = ours.examples == theirs.examples and all(
        seed in ours.resampled and seed in theirs.resampled for seed in common
    )
    resampled = {
        seed: [a - b for a, b in zip(ours.resampled[seed], theirs.resampled[seed], strict=True)]
        for seed in (common if both else ())
    }
    gain, count = statistics.mean(gains.values()), len(common)
    over_seeds, over_examples, error = _errors(gains, resampled)
    spread = statistics.stdev(gains.values()) if count > 1 else 0.0
    effect = gain / spread if spread else None
    if error is None:
        return Difference(gain, None, None, -math.inf, math.inf, effect, count)
    if error == 0:
        return Difference(gain, 0.0, 1.0 if gain == 0 else 0.0, gain, gain, effect, count)
    from scipy.stats import t

    parts = [(over_seeds, count - 1), (over_examples, ours.examples - 1)]
    freedom = error**4 / sum(part**2 / n for part, n in parts if part and n > 0)
    p = float(2 * t.sf(abs(gain) / error, freedom))
    reach = float(t.ppf(1 - SIGNIFICANT / 2, freedom)) * error
    return Difference(gain, error, p, gain - reach, gain + reach, effect, count)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Correct p for the number of tests: ``max_{j <= i} min(1, (m - j + 1) p_(j))``.

    A p of None stands for a test that was not made; it stays None and does not count.
    """
    made = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, (p, i) in enumerate(made):
        highest = max(highest, min(1.0, (len(made) - rank) * p))
        corrected[i] = highest
    return corrected


def _errors(
    seeds: Mapping[int, float], resampled: Mapping[int, Sequence[float]]
) -> tuple[float, float, float | None]:
    """Return the variance of a mean over seeds and over examples, and the standard error."""
    known = False
    over_seeds = over_examples = 0.0
    if len(seeds) > 1:
        over_seeds, known = statistics.variance(seeds.values()) / len(seeds), True
    if seeds and all(seed in resampled for seed in seeds):
        means = [statistics.fmean(row) for row in zip(*(resampled[s] for s in seeds), strict=True)]
        over_examples, known = statistics.variance(means), True
    return over_seeds, over_examples, math.sqrt(over_seeds + over_examples) if known else None
