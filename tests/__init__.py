"""Tests: of each package, of the methods, of the recipes, and of the whole."""
