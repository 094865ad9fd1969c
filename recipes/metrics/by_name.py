"""Scores by the names that a recipe gives: of classes by scikit-learn, of texts by others.

    classes   accuracy, balanced_accuracy, matthews_corrcoef, cohen_kappa,
              f1, precision, recall            of the second of two classes
              f1_macro, f1_micro, f1_weighted, and the same for precision and recall
    texts     exact_match, word_f1             as CoQA defines them, per cent
              bleu, chrf, ter                  sacrebleu, per cent
              rouge1, rouge2, rougeL           rouge_score, per cent

Scores of classes lie between 0 and 1 (-1 and 1 for the two coefficients).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from surgery import RecipeError, suggest
from surgery_recipes.metrics import coqa, ngram_overlap

_AVERAGED = ("f1", "precision", "recall")
_SKLEARN: dict[str, tuple[str, dict[str, Any]]] = {
    "accuracy": ("accuracy_score", {}),
    "balanced_accuracy": ("balanced_accuracy_score", {}),
    "matthews_corrcoef": ("matthews_corrcoef", {}),
    "cohen_kappa": ("cohen_kappa_score", {}),
    **{
        name + (f"_{average}" if average != "binary" else ""): (
            f"{name}_score",
            {"average": average, "zero_division": 0.0},
        )
        for name in _AVERAGED
        for average in ("binary", "macro", "micro", "weighted")
    },
}
_SACREBLEU = ("bleu", "chrf", "ter")
_ROUGE = ("rouge1", "rouge2", "rougeL")
CLASS_SCORES = tuple(_SKLEARN)
TEXT_SCORES = ("exact_match", "word_f1", *_SACREBLEU, *_ROUGE)
_PACKAGES = {
    **dict.fromkeys(_SKLEARN, ("sklearn", "scikit-learn")),
    **dict.fromkeys(_SACREBLEU, ("sacrebleu", "sacrebleu")),
    **dict.fromkeys(_ROUGE, ("rouge_score", "rouge-score")),
}


def check_names(names: Sequence[str], known: Sequence[str], where: str) -> None:
    """Raise unless every score is known and can be computed here.

    Raises:
        RecipeError: a name is unknown or given twice, or its package is not installed. The message
            begins with ``where``.
    """
    if not names or len(set(names)) < len(names):
        raise RecipeError(f"{where}: metrics must name at least one score, and each only once.")
    for name in names:
        if name not in known:
            raise RecipeError(
                f"{where}: no metric {name!r}. {suggest(name, known)}Metrics: {', '.join(known)}."
            )
        module, package = _PACKAGES.get(name, ("", ""))
        if name != "accuracy" and module and importlib.util.find_spec(module) is None:
            raise RecipeError(
                f"{where}: metric {name!r} is computed with {package}. pip install {package}"
            )


def class_scores(
    names: Sequence[str], answers: Sequence[int], right: Sequence[int]
) -> dict[str, float]:
    """Scores of classes by name. A class that is never answered has precision 0."""
    found = {}
    for name in names:
        if name == "accuracy":  # the one that needs no package
            found[name] = sum(a == b for a, b in zip(answers, right, strict=True)) / len(right)
            continue
        import sklearn.metrics

        function, options = _SKLEARN[name]
        with warnings.catch_warnings():  # of classes that a small sample lacks
            warnings.simplefilter("ignore")
            found[name] = float(getattr(sklearn.metrics, function)(right, answers, **options))
    return found


def text_scores(
    names: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Scores of texts by name, in per cent: the best reference counts, or all for sacrebleu's."""
    found: dict[str, float] = {}
    if set(names) & set(_SACREBLEU):
        overlap = ngram_overlap.scores(answers, references, ter="ter" in names)
        found |= {name: overlap[name] for name in names if name in _SACREBLEU}
    measures: dict[str, Callable[[str, str], float]] = {
        "exact_match": coqa.exact, "word_f1": coqa.f1,
    }  # fmt: skip
    if wanted := [name for name in names if name in _ROUGE]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(wanted, use_stemmer=True)
        for name in wanted:
            measures[name] = lambda a, r, n=name: scorer.score(r, a)[n].fmeasure  # type: ignore[misc]
    for name in names:
        if name in measures:
            best = [
                max(measures[name](answer, reference) for reference in own)
                for answer, own in zip(answers, references, strict=True)
            ]
            found[name] = 100 * sum(best) / len(best)
    return {name: found[name] for name in names}
