"""BLEU, chrF++ and TER against several references, by sacrebleu, with its signatures.

The WebNLG challenge scored tokenised, lower-cased text with another script; BLEU here is
lower-cased with sacrebleu's own tokeniser (13a). Figures of papers are near, not comparable to the
decimal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgery import RecipeError


def scores(
    answers: Sequence[str], references: Sequence[Sequence[str]], ter: bool = True
) -> dict[str, float]:
    """``bleu``, ``chrf``, ``ter`` in per cent. Lower is better for TER, which is slow."""
    padded = columns(references)
    metrics = {name: metric for name, metric in _metrics().items() if ter or name != "ter"}
    return {
        name: float(metric.corpus_score(list(answers), padded).score)
        for name, metric in metrics.items()
    }


def signatures() -> dict[str, str]:
    """How sacrebleu computed each score; ``nrefs:var`` for a varying number of references."""
    found = {}
    for name, metric in _metrics().items():
        metric.corpus_score(["a", "b"], [["a", "b"], ["c", None]])
        found[name] = str(metric.get_signature())
    return found


def columns(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """One list per place, filled up with None, as sacrebleu takes references."""
    most = max(map(len, references))
    return [[own[i] if i < len(own) else None for own in references] for i in range(most)]


def check() -> None:
    """Raise if sacrebleu is not installed, before anything is trained."""
    _metrics()


def _metrics() -> dict[str, Any]:
    try:
        from sacrebleu.metrics import BLEU, CHRF, TER
    except ImportError as error:
        raise RecipeError(
            "WebNLG is scored with sacrebleu. pip install 'surgery[recipes]'"
        ) from error
    return {"bleu": BLEU(lowercase=True), "chrf": CHRF(word_order=2), "ter": TER()}
