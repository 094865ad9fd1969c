"""Read a YAML file together with the files that it extends, as plain data.

    extends: base.yaml                 or a list, of which later files win over earlier ones
    training: {learning_rate: 1e-3}    merged into the mapping of the base, key by key

Mappings are merged. Anything else, such as a list or a number, replaces what the base has. Paths
are relative to the file that names them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from surgery import RecipeError


def read_extended(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of ``file`` merged into the content of the files that it extends.

    Args:
        file: the YAML file.
        above: the files that led to this one, each of which extends the next.

    Raises:
        RecipeError: there is no such file, it is not a YAML mapping, or it extends itself.
    """
    by = f" {above[-1]} extends it." if above else " Give the path of a YAML file."
    if not file.is_file():
        raise RecipeError(f"{file}: no such recipe.{by}")
    if file.resolve() in (path.resolve() for path in above):
        chain = " -> ".join(path.name for path in (*above, file))
        raise RecipeError(f"{file}: extends itself: {chain}. Take one of them out.")
    merged: dict[str, Any] = {}
    for base in extended(file):
        merged = merge(merged, read_extended(base, (*above, file)))
    content = _parse(file)
    content.pop("extends", None)
    return merge(merged, content)


def extended(file: Path) -> list[Path]:
    """The files that ``file`` extends, in their order.

    Raises:
        RecipeError: ``extends`` is neither a path nor a list of paths.
    """
    bases = _parse(file).get("extends", [])
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"{file}: extends={bases!r} must be the path of a YAML file, or a list.")
    return [file.parent / name for name in names]


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge ``over`` into ``under``: mappings key by key, everything else replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = merge(below, value) if both and below is not None else value
    return merged


def override(content: dict[str, Any], text: str) -> None:
    """Set one value of ``content``, given as a text such as ``training.max_steps=10``.

    ``data=PATH`` is short for ``data.path=PATH``.

    Raises:
        RecipeError: the text is not ``key=value``, or the key lies below something other than a
            mapping.
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
        raise RecipeError(f"override {text!r}: {'.'.join(parents)} is not a mapping.")
    place[last] = parsed


def parse_value(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        RecipeError: the text is not YAML.
    """
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
        raise RecipeError(
            f"{file}: a recipe is a mapping of keys to values, such as task: sst2. "
            "See surgery_recipes.recipe_files.Recipe."
        )
    return content


class _Loader(yaml.SafeLoader):
    """Reads ``1e-3`` as a number and ``no`` as a text, as YAML 1.2 does; PyYAML follows 1.1."""


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
