"""Comparisons: run every recipe of a grid, and write tables and plots of the results."""

from surgery_recipes.comparison.compare import run_grid
from surgery_recipes.comparison.duration import seconds_of
from surgery_recipes.comparison.grid import models, read_grid

__all__ = ["models", "read_grid", "run_grid", "seconds_of"]
