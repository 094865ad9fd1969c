"""Load a finished run again: its data, its answers, and its model as it began and as it ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

import surgery
from surgery import RecipeError
from surgery_recipes.recipe_files import reason
from surgery_recipes.run.build import freeze_all_but_head, load_base, planned_methods, splice
from surgery_recipes.run.prepare import Prepared, prepare_run
from surgery_recipes.run.run_folder import finished, recipe_of_run
from surgery_recipes.run.trainer import training_arguments


@dataclass(frozen=True)
class LoadedRun:
    """A finished run.

    Attributes:
        folder: where it is.
        prepared: its recipe, task, tokenizer and examples.
        arguments: how it was trained.
    """

    folder: Path
    prepared: Prepared
    arguments: TrainingArguments

    def start(self) -> Any:
        """The model before its training; a classifier's head is as new as it was then."""
        model = load_base(self.prepared, self.arguments.seed)
        splice(model, self.prepared, planned_methods(self.prepared.recipe))
        return model.to(self.arguments.device).eval()

    def end(self) -> Any:
        """The model after its training."""
        return load_trained(self.prepared, self.arguments, self.folder).eval()

    def answers(self) -> dict[str, list[Any]]:
        """The answers to each scored split: class numbers, or texts.

        Raises:
            RecipeError: ``answers.jsonl`` is damaged, or is of other examples.
        """
        file, task = self.folder / "answers.jsonl", self.prepared.task
        found: dict[str, list[Any]] = {}
        try:
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                given = entry["answer"]
                answer = task.labels.index(given) if task.labels else given
                found.setdefault(entry["set"], []).append(answer)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RecipeError(
                f"{file} is damaged: {reason(error)}. Train the run again."
            ) from error
        counts = {name: len(self.prepared.examples[name]) for name in self.prepared.scored}
        if {name: len(given) for name, given in found.items()} != counts:
            raise RecipeError(f"{file} answers other examples than the data hold now: {counts}.")
        return found


def load_run(folder: Path, overrides: Sequence[str] = (), trust: bool = False) -> LoadedRun:
    """Read a finished run.

    Args:
        overrides: see :func:`recipe_of_run`.

    Raises:
        RecipeError: the folder holds no finished run, or its data are gone.
    """
    if not finished(folder):
        raise RecipeError(f"{folder}: no finished run here. Give the output folder of one.")
    recipe = recipe_of_run(folder, overrides)
    return LoadedRun(folder, prepare_run(recipe, trust), training_arguments(recipe))


def load_trained(prepared: Prepared, made: TrainingArguments, folder: Path) -> Any:
    """A freshly loaded base with the adapter of a run, or the model that it trained as a whole."""
    if prepared.recipe.splice:
        base = load_base(prepared, made.seed)
        model = surgery.load(base, folder / "adapter", keep=prepared.recipe.keep)
    else:
        whole = folder / "model"  # not there if nothing was trained
        model = load_base(prepared, made.seed, str(whole) if whole.is_dir() else "")
        if prepared.recipe.frozen:
            freeze_all_but_head(model)
    return model.to(made.device)
