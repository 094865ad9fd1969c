"""BLEU, chrF++ and TER against several references, computed by sacrebleu.

The WebNLG challenge scored tokenised text in lower case with another script. BLEU here is in lower
case too, with sacrebleu's own tokeniser (13a), so papers' numbers are close but not comparable to
the decimal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgery import RecipeError


def scores(
    answers: Sequence[str], references: Sequence[Sequence[str]], ter: bool = True
) -> dict[str, float]:
    """``bleu``, ``chrf`` and ``ter`` in per cent. TER is slow to compute, and lower is better."""
    padded = columns(references)
    metrics = {name: metric for name, metric in _metrics().items() if ter or name != "ter"}
    return {
        name: float(metric.corpus_score(list(answers), padded).score)
        for name, metric in metrics.items()
    }


def signatures() -> dict[str, str]:
    """sacrebleu's signature of each score; ``nrefs:var`` is a varying number of references."""
    found = {}
    for name, metric in _metrics().items():
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


def _metrics() -> dict[str, Any]:
    try:
        from sacrebleu.metrics import BLEU, CHRF, TER
    except ImportError as error:
        raise RecipeError(
            "WebNLG is scored with sacrebleu. pip install 'surgery[recipes]'"
        ) from error
    return {"bleu": BLEU(lowercase=True), "chrf": CHRF(word_order=2), "ter": TER()}
