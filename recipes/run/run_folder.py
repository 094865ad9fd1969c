"""Decide whether a run may start or continue in a folder, and keep its state there."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from surgery import RecipeError
from surgery_recipes.recipe_files import Recipe, read_recipe, write_recipe

CHECKPOINTS = "checkpoints"
RECIPE, METRICS, TRAINED = "recipe.yaml", "metrics.json", "trained.json"


@dataclass(frozen=True)
class RunOptions:
    """Options of the command line.

    Attributes:
        resume: continue an unfinished run.
        overwrite: replace what the folder holds.
        wandb: log to Weights & Biases.
    """

    resume: bool = False
    overwrite: bool = False
    wandb: bool = False


def finished(folder: Path) -> bool:
    """Whether the run in the folder was trained and scored."""
    return (folder / METRICS).is_file()


def begun(folder: Path) -> bool:
    """Whether a run can be resumed here, from a checkpoint or with scoring."""
    return (folder / TRAINED).is_file() or last_checkpoint(folder) is not None


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint of the run in the folder, or None."""
    checkpoints = folder / CHECKPOINTS
    return get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None


def check_folder(folder: Path, recipe: Recipe, run: RunOptions) -> None:
    """Check that this run may use the folder, without writing anything.

    Raises:
        RecipeError: the folder holds another run, holds none to resume, or cannot be written to.
    """
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise RecipeError(
            f"output={folder}: {above} is not a folder that can be written to. "
            "Choose another with output=PATH."
        )
    if run.resume:
        if finished(folder):
            raise RecipeError(
                f"--resume: {folder} holds a finished run. Score it again with surgery eval, train "
                "again with --overwrite, or choose another folder with output=PATH."
            )
        if not begun(folder):
            raise RecipeError(
                f"--resume: {folder} has no checkpoint to resume from. Start again with "
                "--overwrite."
            )
        same_settings(folder, recipe, "the run has")
        return
    if run.overwrite:
        return
    if finished(folder):
        raise RecipeError(
            f"{folder} holds the results of a finished run. Choose another folder with "
            "output=PATH, or replace them with --overwrite."
        )
    if begun(folder):
        raise RecipeError(
            f"{folder} holds an unfinished run. Continue it with --resume, start again with "
            "--overwrite, or choose another folder with output=PATH."
        )
    if (folder / "adapter").exists() or (folder / "model").exists():
        raise RecipeError(
            f"{folder} holds what an interrupted run learnt. Replace it with --overwrite, or "
            "choose another folder with output=PATH."
        )


def start_folder(folder: Path, recipe: Recipe, run: RunOptions) -> None:
    """Make the folder and write the recipe; with ``overwrite``, remove an earlier run first."""
    if run.overwrite and folder.is_dir():
        for old in (folder / CHECKPOINTS, folder / "adapter", folder / "model"):
            shutil.rmtree(old, ignore_errors=True)
        for name in (METRICS, TRAINED):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, folder / RECIPE)


def write_trained(folder: Path, numbers: dict[str, Any]) -> None:
    """Record that training is over, with its numbers: only scoring remains."""
    (folder / TRAINED).write_text(json.dumps(numbers))


def read_trained(folder: Path) -> dict[str, Any] | None:
    """The numbers that :func:`write_trained` recorded, or None while training is not over."""
    file = folder / TRAINED
    if not file.is_file():
        return None
    numbers: dict[str, Any] = json.loads(file.read_text())
    return numbers


def same_settings(folder: Path, recipe: Recipe, asked: str) -> None:
    """Check that the run in the folder had the settings of this recipe.

    Raises:
        RecipeError: a setting differs. ``asked`` says who asks for the new one.
    """
    file = folder / RECIPE
    before = dataclasses.asdict(read_recipe(file)) if file.is_file() else {}
    for name, (then, wanted) in _differences(before, dataclasses.asdict(recipe)):
        raise RecipeError(
            f"{folder}: that run had {name}={then!r}, {asked} {wanted!r}. Take the same setting or "
            "another folder, or delete this one."
        )


def _differences(before: Any, now: Any, name: str = "") -> Iterable[tuple[str, tuple[Any, Any]]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            whole = f"{name}.{key}" if name else str(key)
            yield from _differences(before.get(key), now.get(key), whole)
    elif before != now and name not in ("output", "about"):
        yield name, (before, now)
