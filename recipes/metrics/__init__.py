"""Metrics: the scores of the papers, each with the source of its definition."""

from surgery_recipes.metrics import coqa, meteor, ngram_overlap

__all__ = ["coqa", "meteor", "ngram_overlap"]
