"""What the tests of runs share: recipes on tiny models, saved tensors, and an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from rich.console import Console

from surgery.adapter.reading import read
from surgery_recipes.recipe_files import Recipe, find_recipe, read_recipe
from surgery_recipes.run import finetune
from surgery_recipes.run.trainer import AdapterTrainer
from tests.recipes import tiny

QUIET = Console(quiet=True)


def recipe(name: str, root: Path, output: Path, *more: str) -> Recipe:
    task = name.split("/")[0]
    model, data = tiny.prepared(task, root)
    return read_recipe(find_recipe(name), [*tiny.overrides(task, model, data, output), *more])


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return read(run / "adapter")[1]


def stop_at(step: int, made: Recipe, console: Console = QUIET) -> None:
    """Train until Ctrl-C is pressed at a step."""

    class Press(tr.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    patch = pytest.MonkeyPatch()
    patch.setattr(AdapterTrainer, "create_optimizer", pressing(AdapterTrainer, Press()))
    try:
        with pytest.raises(KeyboardInterrupt):
            finetune.train(made, console)
    finally:
        patch.undo()


def pressing(cls: Any, callback: Any) -> Any:
    original = cls.create_optimizer

    def create_optimizer(self: Any, *args: Any) -> Any:
        self.add_callback(callback)
        return original(self, *args)

    return create_optimizer
