"""Decide whether a run may start or continue in a folder, and keep its state there."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery import RecipeError
from surgery_recipes.recipe_files import (
    Recipe,
    read_recipe,
    reason,
    shown,
    write_recipe,
    write_whole,
)
from surgery_recipes.run.checkpoints import CHECKPOINTS, checkpoints, whole_checkpoints

RECIPE, METRICS, TRAINED = "recipe.yaml", "metrics.json", "trained.json"


@dataclass(frozen=True)
class RunOptions:
    """Options of the command line.

    Attributes:
        resume: continue an unfinished run.
        overwrite: replace what the folder holds.
        wandb: log to Weights & Biases.
        trust: import the package of ``model: package:NAME``, whatever it is.
    """

    resume: bool = False
    overwrite: bool = False
    wandb: bool = False
    trust: bool = False


def finished(folder: Path) -> bool:
    """Whether the run in the folder was trained and scored."""
    return (folder / METRICS).is_file()


def begun(folder: Path) -> bool:
    """Whether a run can be resumed here, from a checkpoint or with scoring."""
    return (folder / TRAINED).is_file() or any(whole_checkpoints(folder))


def recipe_of_run(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a finished run, to score it again from any folder.

    A path of its model or data that leads nowhere from here is looked for from the folders above
    the run, from one of which it was started.

    Args:
        folder: the run.
        overrides: texts such as ``limit.test=10``, which win over the recipe.

    Raises:
        RecipeError: the recipe is damaged, or an override changes what was trained.
    """
    trained = read_recipe(folder / RECIPE)
    recipe = read_recipe(folder / RECIPE, overrides)
    for name, (before, now) in differences(dataclasses.asdict(trained), dataclasses.asdict(recipe)):
        if name.split(".")[0] in ("splice", "task", "keep", "train_head", "baseline"):
            raise RecipeError(
                f"{name}={shown(now)}: the run was trained with {shown(before)}. Train another run "
                "to change it."
            )
    data = dict(recipe.data)
    if data.get("path"):
        data["path"] = _from_above(folder, str(data["path"]))
    return dataclasses.replace(recipe, model=_from_above(folder, recipe.model), data=data)


def _from_above(folder: Path, path: str) -> str:
    if Path(path).is_absolute() or os.path.exists(path):
        return path
    above = (str(parent / path) for parent in folder.resolve().parents)
    return next(filter(os.path.exists, above), path)


def check_folder(folder: Path, recipe: Recipe, run: RunOptions) -> None:
    """Check that this run may use the folder, without writing anything.

    Raises:
        RecipeError: the folder holds another run, holds none to resume, or cannot be written to.
    """
    try:
        folder.is_dir()
    except OSError as error:
        raise RecipeError(
            f"output={shown(str(folder))}: {reason(error)}. Choose another folder."
        ) from error
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
            half = ", ".join(path.name for path in checkpoints(folder))
            raise RecipeError(
                f"--resume: {folder} has no checkpoint to resume from"
                f"{f'; {half} was not written whole' if half else ''}. Start again with "
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
    write_whole(folder / TRAINED, json.dumps(numbers))


def read_trained(folder: Path) -> dict[str, Any] | None:
    """The numbers that :func:`write_trained` recorded, or None while training is not over."""
    file = folder / TRAINED
    if not file.is_file():
        return None
    try:
        numbers: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise RecipeError(
            f"{file} is damaged: {reason(error)}. Delete it: --resume then goes on from the last "
            "checkpoint."
        ) from error
    return numbers


def same_settings(folder: Path, recipe: Recipe, asked: str) -> None:
    """Check that the run in the folder had the settings of this recipe.

    Raises:
        RecipeError: a setting differs. ``asked`` says who asks for the new one.
    """
    file = folder / RECIPE
    before = dataclasses.asdict(read_recipe(file)) if file.is_file() else {}
    for name, (then, wanted) in differences(before, dataclasses.asdict(recipe)):
        raise RecipeError(
            f"{folder}: that run had {name}={shown(then)}, {asked} {shown(wanted)}. Take "
            "the same setting or another folder, or delete this one."
        )


def differences(before: Any, now: Any, name: str = "") -> Iterable[tuple[str, tuple[Any, Any]]]:
    """The settings that two recipes, as plain data, do not share; ``output`` is none of them."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            whole = f"{name}.{key}" if name else str(key)
            yield from differences(before.get(key), now.get(key), whole)
    elif before != now and name not in ("output", "about"):
        yield name, (before, now)
