"""A model that a package should carry is found, or the package is named."""

from __future__ import annotations

import pytest

from surgery.errors import RecipeError
from surgery_recipes.run.model_source import model_path


def test_a_package_without_a_model_is_named() -> None:
    with pytest.raises(RecipeError, match=r"'package:json'.*no get_model_path"):
        model_path("package:json")
