"""Recipes: the training runs of ``surgery train``, in YAML, and the code that carries them out."""
