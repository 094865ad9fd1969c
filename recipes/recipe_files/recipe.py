"""Describe one training run as a ``Recipe``, and read and write it as YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery import RecipeError, suggest
from surgery_recipes.recipe_files.layered_yaml import merge, override, read_extended
from surgery_recipes.recipe_files.plain_yaml import write_yaml
from surgery_recipes.recipe_files.shown_values import shown


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
            a model and has a function ``get_model_path()``. Its code is imported, so it is asked
            for, or needs ``--trust``.
        task: the registered name of the task to train and score; ``surgery.tasks()`` lists them.
        about: a few words that say what the run is.
        data: the options of the task: files, columns, lengths.
        splice: one entry for each method: ``method``, its options, and where it goes: ``at``
            (attention or ffn) and ``layers`` ([first, last + 1]). Without entries the whole model
            is trained.
        frozen: train nothing of the base, and splice nothing in: only a freshly initialised head
            learns. Without such a head the base is scored as it is.
        keep: modules of the base that are trained too.
        train_head: train a freshly initialised head. Some protocols freeze it.
        baseline: also train the base with nothing spliced in and only its head, for comparison.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: the dtype of the base and of what is inserted: ``float32``, or ``auto`` for the one
            of the model's files. Mixed precision takes float32 and ``training.bf16``.
        trainer: ``sft`` for TRL's SFTTrainer, whose ``SFTConfig`` then names the keys of
            ``training``; "" for transformers' Trainer.
        quantize: ``nf4`` or ``int8`` to load the base that way, by bitsandbytes; "" for as it is.
        limit: how many examples of a split to take, for trials: ``{train: 100, test: 10}``. They
            are drawn at random, and always the same.
        validate_only: score the validation split, and leave the others out: how a rate is chosen.
        patience: stop after this many validations without an improvement; 0 never stops early.
        training: arguments of ``transformers.TrainingArguments``.
        output: the folder of the run.
    """

    model: str
    task: str
    about: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    splice: list[dict[str, Any]] = field(default_factory=list)
    frozen: bool = False
    keep: list[str] = field(default_factory=list)
    train_head: bool = True
    baseline: bool = False
    device: str = "auto"
    dtype: str = "float32"
    trainer: str = ""
    quantize: str = ""
    limit: dict[str, Any] = field(default_factory=dict)
    validate_only: bool = False
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
                f"{where}: unknown key {shown(key)}. {suggest(str(key), fields)}"
                f"Keys: {', '.join(fields)}."
            )
    for key in ("model", "task"):
        if key not in content:
            raise RecipeError(f"{where}: the key {key!r} is missing.")
    blank = Recipe(model="", task="")
    for key, value in content.items():
        kind = type(getattr(blank, key))
        if type(value) is not kind:
            raise RecipeError(f"{where}: {key}={shown(value)} must be a {kind.__name__}.")
    recipe = Recipe(**content)
    for entry in recipe.splice:
        if not isinstance(entry, dict) or "method" not in entry:
            raise RecipeError(f"{where}: splice entry {shown(entry)} needs a key 'method'.")
        if not isinstance(entry["method"], str):
            raise RecipeError(f"{where}: splice entry {shown(entry)}: method must be a name.")
    if not all(isinstance(name, str) for name in recipe.keep):
        raise RecipeError(f"{where}: keep={shown(recipe.keep)} must be names of modules.")
    if recipe.patience < 0:
        raise RecipeError(f"{where}: patience={recipe.patience} must be 0 or more.")
    if recipe.device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"{where}: device={shown(recipe.device)} must be auto, cpu or cuda.")
    if recipe.dtype not in ("float32", "auto"):
        raise RecipeError(f"{where}: dtype={shown(recipe.dtype)} must be float32 or auto.")
    if recipe.trainer not in ("", "sft"):
        raise RecipeError(
            f"{where}: trainer={shown(recipe.trainer)} must be sft, or left out for transformers'."
        )
    if recipe.quantize not in ("", "nf4", "int8"):
        raise RecipeError(f"{where}: quantize={shown(recipe.quantize)} must be nf4 or int8.")
    if recipe.frozen and (recipe.splice or recipe.keep or recipe.baseline):
        raise RecipeError(
            f"{where}: frozen trains nothing but a new head, so there is nothing to splice in, to "
            "keep or to compare. Leave splice, keep and baseline out."
        )
    if recipe.quantize and (recipe.baseline or not (recipe.splice or recipe.frozen)):
        raise RecipeError(
            f"{where}: a quantised base is trained with adapters only. Add a splice entry, and set "
            "baseline to false."
        )
    return recipe


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as one YAML file that extends nothing."""
    write_yaml(dataclasses.asdict(recipe), path)
