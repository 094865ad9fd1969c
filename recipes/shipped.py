"""Shipped: the recipes that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from surgery import RecipeError, suggest

HERE = Path(__file__).parent
PARTS = ("bases", "rows", "tables", "data")


def shipped() -> dict[str, Path]:
    """Every shipped recipe: ``quickstart``, ``webnlg/inducer`` and so on."""
    found = sorted(HERE.rglob("*.yaml"))
    relative = {path.relative_to(HERE): path for path in found}
    return {
        path.with_suffix("").as_posix(): whole
        for path, whole in relative.items()
        if path.parts[0] not in PARTS
    }


def tables() -> dict[str, Path]:
    """Every shipped table: ``table1`` and so on."""
    return {path.stem: path for path in sorted((HERE / "tables").glob("*.yaml"))}


def find(name: str) -> Path:
    """The file of a shipped recipe, or of a path.

    Raises:
        RecipeError: neither.
    """
    return _find(name, "recipe", shipped())


def find_table(name: str) -> Path:
    """The file of a shipped table, ``table1`` and so on, or of a path."""
    return _find(name, "table", tables())


def _find(name: str, what: str, known: dict[str, Path]) -> Path:
    if Path(name).is_file():
        return Path(name)
    if name not in known:
        raise RecipeError(
            f"{name}: no such {what}. {suggest(name, known)}Give the path of a YAML file, or a "
            "name that `surgery recipes` lists."
        )
    return known[name]
