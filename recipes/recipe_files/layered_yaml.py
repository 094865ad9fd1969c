"""Read a YAML file together with the files that it extends, as plain data.

    extends: base.yaml                 or a list, of which later files win over earlier ones
    training: {learning_rate: 1e-3}    merged into the mapping of the base, key by key

Mappings are merged. Anything else, such as a list or a number, replaces what the base has. Paths
are relative to the file that names them.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from surgery import RecipeError, suggest
from surgery_recipes.recipe_files.plain_yaml import MAX_DEPTH, is_file, parse_value, read_yaml
from surgery_recipes.recipe_files.shown_values import short, shown

MAX_FILES = 100  # of one recipe


def read_extended(file: Path) -> dict[str, Any]:
    """The content of ``file`` merged into the content of the files that it extends.

    Raises:
        RecipeError: there is no such file, it is not a YAML mapping, it extends itself, or it
            extends too many files.
    """
    return _read(file, (), count(1))


def extended(file: Path) -> list[Path]:
    """The files that ``file`` extends, in their order.

    Raises:
        RecipeError: ``extends`` is neither a path nor a list of paths.
    """
    return _bases(file, _mapping(file))


def _read(file: Path, above: tuple[Path, ...], number: Iterator[int]) -> dict[str, Any]:
    """``above`` are the files that led to this one, each of which extends the next."""
    by = f" {above[-1]} extends it." if above else " Give the path of a YAML file."
    if next(number) > MAX_FILES:
        raise RecipeError(f"{above[0]}: extends more than {MAX_FILES} files. Merge some of them.")
    if not is_file(file):
        what = "this is a folder or a device" if os.path.exists(file) else "no such recipe"
        raise RecipeError(f"{short(str(file))}: {what}.{by}")
    if file.resolve() in (path.resolve() for path in above):
        chain = " -> ".join(path.name for path in (*above, file))
        raise RecipeError(f"{file}: extends itself: {chain}. Take one of them out.")
    content, merged = _mapping(file), dict[str, Any]()
    for base in _bases(file, content):
        merged = merge(merged, _read(base, (*above, file), number))
    content.pop("extends", None)
    return merge(merged, content)


def _bases(file: Path, content: dict[str, Any]) -> list[Path]:
    bases = content.get("extends", [])
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(
            f"{file}: extends={shown(bases)} must be the path of a YAML file, or a list."
        )
    return [file.parent / name for name in names]


def _mapping(file: Path) -> dict[str, Any]:
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise RecipeError(
            f"{file}: a recipe is a mapping of keys to values, such as task: sst2. "
            "See surgery_recipes.recipe_files.Recipe."
        )
    return content


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

    ``data=PATH`` is short for ``data.path=PATH``. ``splice.lora.rank=4`` sets an option of each
    entry of ``splice`` with the method lora, ``splice.1.rank=4`` of the first entry.

    Raises:
        RecipeError: the text is not ``key=value``, its value is not YAML, or the key lies below
            something other than a mapping, or names no entry of ``splice``.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(
            f"override {shown(text)}: write key=value, such as training.max_steps=10."
        )
    parsed = parse_value(value)
    if name == "data" and isinstance(parsed, str):
        name = "data.path"
    *parents, last = name.split(".")
    if len(parents) >= MAX_DEPTH:
        raise RecipeError(f"override {shown(text)}: the key has more than {MAX_DEPTH} parts.")
    if name.startswith("splice.") and isinstance(content.get("splice"), list):
        for entry in _entries(content["splice"], name, text):
            _set(entry, [], last, parsed, text)
        return
    _set(content, parents, last, parsed, text)


def _entries(splice: list[Any], name: str, text: str) -> list[Any]:
    """The entries of ``splice`` that an override names, by their method or their number."""
    _, which, *option = name.split(".")
    if len(option) != 1:
        raise RecipeError(f"override {shown(text)}: write splice.METHOD.OPTION=value.")
    if which.isdecimal():
        return splice[int(which) - 1 : int(which)] or _no_entry(splice, which, text)
    found = [e for e in splice if isinstance(e, dict) and e.get("method") == which]
    return found or _no_entry(splice, which, text)


def _no_entry(splice: list[Any], which: str, text: str) -> list[Any]:
    names = [str(e.get("method")) for e in splice if isinstance(e, dict)]
    raise RecipeError(
        f"override {shown(text)}: this recipe splices no {shown(which)}. {suggest(which, names)}"
        f"It splices: {', '.join(names) or 'nothing'}."
    )


def _set(content: Any, parents: list[str], last: str, parsed: Any, text: str) -> None:
    """Set a value below keys that are made as needed."""
    place: Any = content
    for key in parents:
        place = place.setdefault(key, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise RecipeError(f"override {shown(text)}: {'.'.join(parents)} is not a mapping.")
    place[last] = parsed
