"""BLEU, chrF++ and TER against several references, computed by sacrebleu.

BLEU is in lower case with sacrebleu's own tokeniser (13a). The WebNLG challenge of 2017 prepared
texts otherwise before it scored them with multi-bleu: ``challenge=True`` does as its published
script does, see :func:`as_challenge`, and BLEU is then that of multi-bleu.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery import RecipeError

CHALLENGE = {"tokenize": "none", "smooth_method": "none", "force": True}  # multi-bleu


def scores(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    ter: bool = True,
    challenge: bool = False,
) -> dict[str, float]:
    """``bleu``, ``chrf`` and ``ter`` in per cent. TER is slow to compute, and lower is better.

    Args:
        challenge: the texts come from :func:`as_challenge`.
    """
    padded = columns(references)
    made = _metrics(challenge)
    metrics = {name: metric for name, metric in made.items() if ter or name != "ter"}
    return {
        name: float(metric.corpus_score(list(answers), padded).score)
        for name, metric in metrics.items()
    }


def resampled(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    draws: Sequence[Sequence[int]],
    ter: bool = True,
    challenge: bool = False,
) -> dict[str, list[float]]:
    """``bleu`` and ``ter`` of resamples of the examples, from what each sentence adds to them.

    BLEU is made of sums of n-gram counts and lengths, TER of sums of edits and lengths. chrF++ is
    left out: sacrebleu tells no sums of it.

    Args:
        draws: the numbers of the sentences of each resample.
        challenge: as for :func:`scores`.
    """
    metrics = _metrics(challenge)
    found: dict[str, list[float]] = {"bleu": []}
    smooth = metrics["bleu"].smooth_method
    metric = type(metrics["bleu"])(
        lowercase=True, effective_order=True, **(CHALLENGE if challenge else {})
    )
    parts = [
        metric.sentence_score(answer, list(own))
        for answer, own in zip(answers, references, strict=True)
    ]
    sums = np.array([[*part.counts, *part.totals, part.sys_len, part.ref_len] for part in parts])
    for chosen in draws:
        *ngrams, sys_len, ref_len = sums[list(chosen)].sum(0).tolist()
        order = len(ngrams) // 2
        bleu = metric.compute_bleu(
            ngrams[:order], ngrams[order:], sys_len, ref_len, smooth_method=smooth
        )
        found["bleu"].append(float(bleu.score))
    if ter:
        edits = [
            metrics["ter"].sentence_score(answer, list(own))
            for answer, own in zip(answers, references, strict=True)
        ]
        pairs = np.array([[each.num_edits, each.ref_length] for each in edits])
        totals = [pairs[list(chosen)].sum(0) for chosen in draws]
        found["ter"] = [float(100 * made / long) if long else 0.0 for made, long in totals]
    return found


def signatures(challenge: bool = False) -> dict[str, str]:
    """sacrebleu's signature of each score; ``nrefs:var`` is a varying number of references."""
    found = {}
    for name, metric in _metrics(challenge).items():
        metric.corpus_score(["a", "b"], [["a", "b"], ["c", None]])
        found[name] = str(metric.get_signature())
    return found


def columns(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """sacrebleu's layout: a list of all first references, of all second ones, filled with None."""
    most = max(map(len, references))
    return [[own[i] if i < len(own) else None for own in references] for i in range(most)]


def check() -> None:
    """Raise a RecipeError if sacrebleu is not installed."""
    _metrics()


def as_challenge(text: str) -> str:
    """Prepare a text as the WebNLG challenge of 2017 does (its evaluation.py).

    It is in lower case, accents are taken off, and every character that is no letter, digit or
    underscore stands alone. The challenge turns all of Unicode into ASCII; here only what is a
    letter with a mark.
    """
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join(" ".join(re.split(r"(\W)", plain)).split())


def _metrics(challenge: bool = False) -> dict[str, Any]:
    try:
        from sacrebleu.metrics import BLEU, CHRF, TER
    except ImportError as error:
        raise RecipeError(
            "WebNLG is scored with sacrebleu. pip install 'surgery[recipes]'"
        ) from error
    bleu = BLEU(lowercase=True, **(CHALLENGE if challenge else {}))
    return {"bleu": bleu, "chrf": CHRF(word_order=2), "ter": TER()}
