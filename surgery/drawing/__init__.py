"""Show the sites of a model: their graphs and their code, before and after a splice."""

from surgery.drawing.look import Anatomy, anatomy, diff

__all__ = ["Anatomy", "anatomy", "diff"]
