"""Exact match and F1 of CoQA, from their description (Reddy et al. 2019, arXiv:1808.07042).

Answers are compared in lower case, without punctuation, articles and extra white space. F1 compares
bags of words. With k > 1 references, each is left out in turn, the best of the other k - 1 counts,
and the k values are averaged. People are measured the same way, as a person's answer can only be
compared with k - 1 others.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
DROPPED = str.maketrans("", "", string.punctuation)


def words(answer: str) -> list[str]:
    """The words of an answer that are compared."""
    return ARTICLES.sub(" ", answer.lower().translate(DROPPED)).split()


@functools.lru_cache(maxsize=65536)  # resamples ask for the same pairs again
def exact(answer: str, reference: str) -> float:
    """1 if the words are the same and in the same order, else 0."""
    return float(words(answer) == words(reference))


@functools.lru_cache(maxsize=65536)
def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words; 1 if neither has words, 0 if one has none."""
    ours, theirs = words(answer), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def against(measure: Callable[[str, str], float], answer: str, references: Sequence[str]) -> float:
    """The best value over the references, averaged over leaving each of them out."""
    values = [measure(answer, reference) for reference in references]
    if len(values) == 1:
        return values[0]
    return sum(max(values[:i] + values[i + 1 :]) for i in range(len(values))) / len(values)


def scores(
    answers: Sequence[str], references: Sequence[Sequence[str]], domains: Sequence[str]
) -> dict[str, float]:
    """``em`` and ``f1`` in per cent, averaged over all turns and over those of each domain."""
    turns: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for answer, own, domain in zip(answers, references, domains, strict=True):
        value = against(exact, answer, own), against(f1, answer, own)
        turns[""].append(value)
        turns[f"_{domain}"].append(value)
    found = {}
    for suffix, values in turns.items():
        for name, column in zip(("em", "f1"), zip(*values, strict=True), strict=True):
            found[name + suffix] = 100 * sum(column) / len(column)
    return found


def human(references: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Exact match and F1 of people in per cent: each reference against the others."""
    totals = [
        [
            sum(max(measure(r, o) for o in [*own[:i], *own[i + 1 :]]) for i, r in enumerate(own))
            / len(own)
            for own in references
        ]
        for measure in (exact, f1)
    ]
    em, f = (100 * sum(values) / len(values) for values in totals)
    return em, f
