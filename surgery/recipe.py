"""Recipe: what ``surgery train`` runs, as one YAML file read into one documented dataclass."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from surgery.errors import SurgeryError, suggest


class RecipeError(SurgeryError):
    """A recipe has an unknown key, a bad value, or a file is missing."""


@dataclass(frozen=True)
class Recipe:
    """A training run, complete.

    Attributes:
        model: a hub id, a local folder, or ``package:NAME`` for an installed package that carries
            a model and tells where with ``get_model_path()``.
        task: what is trained and scored; a task of ``recipes/tasks.py``.
        data: the options of the task: files, columns, lengths.
        splice: one entry per method: ``method``, its options, and where: ``at`` (attention or ffn)
            and ``layers`` ([first, last + 1]).
        keep: modules of the base that are trained too; a freshly initialised head always is.
        baseline: also train the base with nothing spliced and only its head, for comparison.
        training: passed on to ``transformers.TrainingArguments`` as it is.
        output: the folder of the run.
    """

    model: str
    task: str
    data: dict[str, Any] = field(default_factory=dict)
    splice: list[dict[str, Any]] = field(default_factory=list)
    keep: list[str] = field(default_factory=list)
    baseline: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    output: str = "runs/latest"


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe; ``overrides`` are ``key=value`` texts such as ``training.max_steps=10``.

    Raises:
        RecipeError: no such file, an unknown key, a value of the wrong kind.
    """
    file = Path(path)
    if not file.is_file():
        raise RecipeError(f"{file}: no such recipe. Give the path of a YAML file.")
    try:
        content = yaml.load(file.read_text(), _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: this is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a recipe is a mapping of keys; see surgery.recipe.Recipe.")
    for override in overrides or []:
        _override(content, override)
    return make_recipe(content, str(file))


def make_recipe(content: dict[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain data, checked."""
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    for key in content:
        if key not in fields:
            raise RecipeError(
                f"{where}: unknown key {key!r}. {suggest(str(key), fields)}"
                f"Keys: {', '.join(fields)}."
            )
    for key in ("model", "task"):
        if key not in content:
            raise RecipeError(f"{where}: the key {key!r} is missing.")
    kinds = {
        "model": str,
        "task": str,
        "output": str,
        "baseline": bool,
        "splice": list,
        "keep": list,
    }
    for key, value in content.items():
        kind = kinds.get(key, dict)
        if not isinstance(value, kind):
            raise RecipeError(f"{where}: {key}={value!r} must be a {kind.__name__}.")
    recipe = Recipe(**content)
    for entry in recipe.splice:
        if not isinstance(entry, dict) or "method" not in entry:
            raise RecipeError(f"{where}: splice entry {entry!r} needs a key 'method'.")
    return recipe


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe beside its results."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as text; here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _override(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"override {override!r}: write key=value, such as training.max_steps=10.")
    *parents, last = name.split(".")
    place: Any = content
    for key in parents:
        place = place.setdefault(key, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise RecipeError(f"override {override!r}: {'.'.join(parents)} is no mapping.")
    place[last] = yaml.load(text, _Loader)
