"""Recipe: what ``surgery train`` runs, as one YAML file read into one documented dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from surgery import RecipeError, suggest
from surgery_recipes.layered_yaml import override, read_extended


@dataclass(frozen=True)
class Recipe:
    """A training run, complete.

    Attributes:
        model: a hub id, a local folder, or ``package:NAME`` for an installed package that carries
            a model and tells where with ``get_model_path()``.
        task: what is trained and scored, by its registered name; ``surgery recipes`` lists some.
        about: what this run is, in a few words.
        data: the options of the task: files, columns, lengths.
        splice: one entry per method: ``method``, its options, and where: ``at`` (attention or ffn)
            and ``layers`` ([first, last + 1]). With no entry the whole model is trained.
        keep: modules of the base that are trained too.
        train_head: train a freshly initialised head (yes, unless a protocol freezes it).
        baseline: also train the base with nothing spliced and only its head, for comparison.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of the base and what is inserted: ``float32``, or ``auto``, as the model's files have
            it. For mixed precision leave it float32 and set ``training.bf16``.
        limit: for trials, take so many examples of a split, drawn at random but always the same:
            ``{train: 100, test: 10}``.
        patience: stop after so many validations without a better one; 0 never stops early.
        training: passed on to ``transformers.TrainingArguments`` as it is.
        output: the folder of the run.
    """

    model: str
    task: str
    about: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    splice: list[dict[str, Any]] = field(default_factory=list)
    keep: list[str] = field(default_factory=list)
    train_head: bool = True
    baseline: bool = False
    device: str = "auto"
    dtype: str = "float32"
    limit: dict[str, Any] = field(default_factory=dict)
    patience: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    output: str = "runs/latest"


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe; ``overrides`` are ``key=value`` texts such as ``training.max_steps=10``.

    Raises:
        RecipeError: no such file, an unknown key, a value of the wrong kind.
    """
    content = read_extended(Path(path))
    for text in overrides or []:
        override(content, text)
    return make_recipe(content, str(path))


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
    blank = Recipe(model="", task="")
    for key, value in content.items():
        kind = type(getattr(blank, key))
        if type(value) is not kind:
            raise RecipeError(f"{where}: {key}={value!r} must be a {kind.__name__}.")
    recipe = Recipe(**content)
    for entry in recipe.splice:
        if not isinstance(entry, dict) or "method" not in entry:
            raise RecipeError(f"{where}: splice entry {entry!r} needs a key 'method'.")
    if recipe.device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"{where}: device={recipe.device!r} must be auto, cpu or cuda.")
    if recipe.dtype not in ("float32", "auto"):
        raise RecipeError(f"{where}: dtype={recipe.dtype!r} must be float32 or auto.")
    return recipe


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe beside its results."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))
