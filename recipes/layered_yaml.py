"""Extend: a YAML file built upon others with ``extends:``, as plain data.

    extends: base.yaml                 or a list; later ones win over earlier ones
    training: {learning_rate: 1e-3}    merged into the base's mapping, key by key

Mappings are merged; anything else (a list, a number) replaces what it stands for. Paths are
relative to the file that names them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from surgery import RecipeError


def read_extended(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of ``file`` upon what it extends; ``above`` are the files that led to it.

    Raises:
        RecipeError: no such file, no YAML mapping, or a file that extends itself.
    """
    by = f" It is what {above[-1]} extends." if above else " Give the path of a YAML file."
    if not file.is_file():
        raise RecipeError(f"{file}: no such recipe.{by}")
    if file.resolve() in (path.resolve() for path in above):
        chain = " -> ".join(path.name for path in (*above, file))
        raise RecipeError(f"{file}: extends itself: {chain}. Take one of them out.")
    content = _parse(file)
    bases = content.pop("extends", [])
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"{file}: extends={bases!r} must be the path of a YAML file, or a list.")
    merged: dict[str, Any] = {}
    for name in names:
        merged = merge(merged, read_extended(file.parent / name, (*above, file)))
    return merge(merged, content)


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid upon ``under``: mappings key by key, all else replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = merge(below, value) if both and below is not None else value
    return merged


def override(content: dict[str, Any], text: str) -> None:
    """Set one value: ``training.max_steps=10``; ``data=PATH`` is short for ``data.path=PATH``.

    Raises:
        RecipeError: no ``key=value``, or a key below something that is no mapping.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"override {text!r}: write key=value, such as training.max_steps=10.")
    parsed = parse_value(value)
    if name == "data" and isinstance(parsed, str):
        name = "data.path"
    *parents, last = name.split(".")
    place: Any = content
    for key in parents:
        place = place.setdefault(key, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise RecipeError(f"override {text!r}: {'.'.join(parents)} is no mapping.")
    place[last] = parsed


def parse_value(text: str) -> Any:
    """The value that a YAML text stands for."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{text!r} is not YAML: {error}") from error


def _parse(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: this is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a recipe is a mapping of keys; see recipes/recipe.py.")
    return content


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as text and ``no`` as false; here, as in 1.2, a number and a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:bool"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
