"""Describe one training run as a ``Recipe``, and read and write it as YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from surgery import RecipeError, suggest
from surgery_recipes.recipe_files.layered_yaml import merge, override, read_extended


@dataclass(frozen=True)
class RecipeFiles:
    """The YAML files that make one recipe.

    Attributes:
        name: the name of a shipped recipe, or the path of the file.
        layers: the files, of which later ones win.
        output: the folder of the run; "" takes the one that the files name.
    """

    name: str
    layers: tuple[Path, ...]
    output: str = ""


@dataclass(frozen=True)
class Recipe:
    """A training run, complete.

    Attributes:
        model: a hub id, a local folder, or ``package:NAME`` for an installed package that carries
            a model and has a function ``get_model_path()``.
        task: the registered name of the task to train and score; ``surgery.tasks()`` lists them.
        about: a few words that say what the run is.
        data: the options of the task: files, columns, lengths.
        splice: one entry for each method: ``method``, its options, and where it goes: ``at``
            (attention or ffn) and ``layers`` ([first, last + 1]). Without entries the whole model
            is trained.
        keep: modules of the base that are trained too.
        train_head: train a freshly initialised head. Some protocols freeze it.
        baseline: also train the base with nothing spliced in and only its head, for comparison.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: the dtype of the base and of what is inserted: ``float32``, or ``auto`` for the one
            of the model's files. Mixed precision takes float32 and ``training.bf16``.
        limit: how many examples of a split to take, for trials: ``{train: 100, test: 10}``. They
            are drawn at random, and always the same.
        patience: stop after this many validations without an improvement; 0 never stops early.
        training: arguments of ``transformers.TrainingArguments``.
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


def read_recipe(source: str | Path | RecipeFiles, overrides: Sequence[str] | None = None) -> Recipe:
    """Read a recipe from a YAML file, or from the files of a shipped recipe.

    Args:
        source: the path of a file, or what ``find_recipe`` gives.
        overrides: texts such as ``training.max_steps=10``, which win over the files.

    Raises:
        RecipeError: there is no such file, a key is unknown, or a value is of the wrong kind.
    """
    files = source if isinstance(source, RecipeFiles) else RecipeFiles(str(source), (Path(source),))
    content: dict[str, Any] = {}
    for layer in files.layers:
        content = merge(content, read_extended(layer))
    if files.output:
        content["output"] = files.output
    for text in overrides or []:
        override(content, text)
    return make_recipe(content, files.name)


def make_recipe(content: dict[str, Any], where: str = "recipe") -> Recipe:
    """A recipe of plain data.

    Raises:
        RecipeError: a key is unknown or missing, or a value is of the wrong kind. The message
            begins with ``where``.
    """
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
    """Write a recipe as one YAML file that extends nothing."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))
