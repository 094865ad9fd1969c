"""Metrics: the scores of the papers, each with the source of its definition, and scores by name."""

from surgery_recipes.metrics import by_name, coqa, meteor, ngram_overlap

__all__ = ["by_name", "coqa", "meteor", "ngram_overlap"]
