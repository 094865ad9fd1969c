"""Say why a run scores as it does: attention to what was spliced in, its updates, its inputs."""

from surgery_recipes.diagnosis.diagnosing import diagnose

__all__ = ["diagnose"]
