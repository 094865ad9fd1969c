"""Differences of rows: against scipy, and against what is true of data that are drawn here."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from surgery_recipes.comparison.significance import Score, difference, holm
from surgery_recipes.run.resampling import draws


def scored(right: np.ndarray) -> Score:
    """The score of answers that are right or wrong (seeds, examples)."""
    chosen = np.array(list(draws(right.shape[1])))
    seeds = dict(enumerate(right.mean(1).tolist()))
    resampled = {seed: row[chosen].mean(1).tolist() for seed, row in enumerate(right)}
    return Score(seeds, resampled, right.shape[1])


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6))
def test_over_seeds_alone_it_is_the_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    found = difference(Score(dict(enumerate(ours))), Score(dict(enumerate(theirs))))
    assert found is not None
    assert found.p is not None
    gains = np.subtract(ours, theirs)
    if gains.std() < 1e-9:
        return
    known = stats.ttest_rel(ours, theirs)
    assert found.p == pytest.approx(known.pvalue, rel=1e-6)
    low, high = known.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-12)
    assert found.effect == pytest.approx(gains.mean() / gains.std(ddof=1))


def test_over_examples_alone_it_is_the_paired_bootstrap() -> None:
    rng = np.random.default_rng(3)
    theirs = rng.random(400) < 0.7
    ours = np.where(rng.random(400) < 0.8, theirs, rng.random(400) < 0.9)
    found = difference(scored(ours[None]), scored(theirs[None]))
    assert found is not None
    known = stats.bootstrap(
        (ours.astype(float), theirs.astype(float)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True, vectorized=True, n_resamples=4000, rng=rng,
    )  # fmt: skip
    # 200 resamples tell a standard error to 1 / sqrt(400) = 5 %; three of those
    assert found.error == pytest.approx(known.standard_error, rel=0.15)
    assert found.effect is None


@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_it_errs_no_more_often_than_it_says(gain: float) -> None:
    """Seeds and examples each move both rows; 300 comparisons."""
    rng, wrong, tries = np.random.default_rng(1), 0, 300
    for _ in range(tries):
        hard = rng.normal(0, 1, 80)
        rows = []
        for extra in (gain * 3, 0.0):
            skill = 0.5 + extra + rng.normal(0, 0.3, 3)[:, None]
            rows.append(skill + hard + rng.normal(0, 1, (3, 80)))
        found = difference(scored(rows[0]), scored(rows[1]))
        assert found is not None
        wrong += not found.low <= gain * 3 <= found.high
    # 5 % of 300 are 15; more than 26 has a probability of 0.3 %
    assert wrong <= 26


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, None, 0.005]) == pytest.approx([0.03, 0.06, 0.06, None, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_p_and_bonferroni_and_keeps_the_order(ps: list[float]) -> None:
    found = holm(ps)
    for p, corrected in zip(ps, found, strict=True):
        assert corrected is not None
        assert p <= corrected <= min(1.0, len(ps) * p) + 1e-12
    order = sorted(range(len(ps)), key=ps.__getitem__)
    ordered = [found[i] for i in order]
    assert ordered == sorted(ordered, key=float)  # type: ignore[arg-type]


def test_what_cannot_be_told_is_not() -> None:
    one = difference(Score({1: 0.9}), Score({1: 0.5}))
    assert one is not None
    assert (one.p, one.error, one.effect, one.high) == (None, None, None, math.inf)
    assert difference(Score({1: 0.9}), Score({2: 0.5})) is None
    same = difference(Score({1: 0.5, 2: 0.5}), Score({1: 0.5, 2: 0.5}))
    assert same is not None
    assert same.p == 1.0
    # resamples of other examples are not paired
    apart = difference(Score({1: 0.9}, {1: [0.9, 0.8]}, 20), Score({1: 0.5}, {1: [0.5, 0.6]}, 30))
    assert apart is not None
    assert apart.p is None
