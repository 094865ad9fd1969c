"""Recipes: what `surgery train` runs. Data and scripts, not a library."""
