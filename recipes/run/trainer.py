"""Adapt transformers' Trainer: weight decay, order of batches, progress, seconds."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

import surgery
from surgery import RecipeError, suggest
from surgery_recipes.recipe_files import Recipe, reason, shown
from surgery_recipes.run import sft
from surgery_recipes.run.answers import pad_id
from surgery_recipes.run.checkpoints import CHECKPOINTS
from surgery_recipes.run.collate import Collator
from surgery_recipes.run.kinds import has_classes
from surgery_recipes.run.prepare import Prepared

LOGGED = 20  # times at least


class LossInBar(ProgressCallback):
    """A progress bar that shows the loss, in place of a printed line for each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class Clock(TrainerCallback, ExportableState):
    """Counts the seconds of training, including those before an interruption."""

    def __init__(self, before: float = 0.0) -> None:
        self.before = before
        self.begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.begun

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def state(self) -> dict[str, Any]:
        return {"args": {"before": self.seconds}, "attributes": {}}


class OftenEnough(TrainerCallback):
    """Logs the loss at least 20 times, however short the run is, so that it can be drawn."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.logging_steps = max(1, min(int(state.logging_steps), state.max_steps // LOGGED))


class OrderOfEpoch(Sampler[int]):
    """Draws the order of each epoch from the seed and the number of the epoch."""

    def __init__(self, sampler: Any, seed: int, epoch: Callable[[], int]) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class AdapterTrainer(Trainer):
    """A Trainer whose weight decay spares rows and biases, and whose batches follow the seed."""

    @property
    def seconds(self) -> float:
        """How long training took, over all its interruptions."""
        clocks = (c for c in self.callback_handler.callbacks if isinstance(c, Clock))
        return next(clocks).seconds

    def create_optimizer(self, *given: Any) -> Any:
        """Let parameters that a module's ``learning_rates()`` names learn at their own rates."""
        optimizer = super().create_optimizer(*given)
        own = surgery.parameter_groups(self.model, lr=1.0)
        times = {id(p): group["lr"] for group in own for p in group["params"]}
        for group in list(optimizer.param_groups):
            for rate in sorted({times[id(p)] for p in group["params"]} - {1.0}):
                apart = [p for p in group["params"] if times[id(p)] == rate]
                group["params"] = [p for p in group["params"] if times[id(p)] != rate]
                options = {key: value for key, value in group.items() if key != "params"}
                optimizer.add_param_group({**options, "params": apart, "lr": rate * group["lr"]})
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Batches of similar length: their order follows from the seed and the epoch alone.

        transformers' sampler draws it from the state of all random numbers, which a run that is
        resumed inside an epoch does not have any more.
        """
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return OrderOfEpoch(sampler, seed, lambda: int(self.state.epoch or 0))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate, and leave the random numbers of training alone."""
        with torch.random.fork_rng(devices=[]):
            found: dict[str, float] = super().evaluate(*args, **kwargs)
        return found

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Validate in order: ``compute_metrics`` pairs predictions with examples by place."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


def training_arguments(recipe: Recipe, wandb: bool = False) -> TrainingArguments:
    """The ``training`` of a recipe as transformers' arguments.

    Raises:
        RecipeError: a key is unknown, a value is of the wrong kind, or there is no GPU to use.
    """
    cls = sft.config_class() if recipe.trainer == "sft" else TrainingArguments
    known = {f.name: f.type for f in dataclasses.fields(cls) if f.init}
    for key, given in recipe.training.items():
        if key not in known:
            raise RecipeError(
                f"training: {cls.__module__.split('.')[0]}.{cls.__name__} has no {shown(key)}. "
                f"{suggest(key, known)}"
            )
        if known[key] in (bool, "bool") and isinstance(given, str):
            raise RecipeError(f"training.{key}={shown(given)} must be true or false.")
        kind = str(known[key])
        if isinstance(given, str) and "str" not in kind and ("int" in kind or "float" in kind):
            raise RecipeError(f"training.{key}={shown(given)} must be a number.")
        if key.startswith("per_device_") and not (isinstance(given, int) and given >= 1):
            raise RecipeError(f"training.{key}={shown(given)} must be a whole number, 1 or more.")
        if key == "output_dir":
            raise RecipeError("training.output_dir: checkpoints go below output=PATH. Set that.")
    _check_device(recipe)
    logs = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    if wandb and importlib.util.find_spec("wandb") is None:
        raise RecipeError("--wandb: the package is not installed. pip install wandb")
    defaults = {
        "output_dir": str(Path(recipe.output) / CHECKPOINTS),
        "report_to": [*logs, *(["wandb"] if wandb else [])] or "none",
        "save_strategy": "no",
        "restore_callback_states_from_checkpoint": True,
        "disable_tqdm": False,  # by default it follows the level of transformers' log
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": recipe.device == "cpu" or not torch.accelerator.is_available(),
    }
    if recipe.trainer == "sft":
        defaults |= sft.defaults(recipe.training, known)
    try:
        made: TrainingArguments = cls(**{**defaults, **recipe.training})
    except Exception as error:  # of a hundred arguments, few are checked before they are used
        raise RecipeError(f"training: {reason(error)}") from error
    if recipe.patience and not made.load_best_model_at_end:
        raise RecipeError(
            "patience compares checkpoints with the best one. Set training.load_best_model_at_end="
            "true, training.eval_strategy=epoch and training.save_strategy=epoch."
        )
    return made


def _check_device(recipe: Recipe) -> None:
    there = torch.cuda.is_available()
    if recipe.device == "cuda" and not there:
        raise RecipeError("device=cuda, but torch finds no GPU here. Use device=auto or cpu.")
    if recipe.training.get("fp16") and (not there or recipe.device == "cpu"):
        raise RecipeError(
            "training.fp16 is for a GPU, and there is none to use. Set training.bf16=true, which "
            "works on a CPU too, or leave both out."
        )


def _check_best(task: surgery.Task, validation: list[Any], made: TrainingArguments) -> None:
    """Raise if the best checkpoint is chosen by a score that validation does not compute."""
    name = made.metric_for_best_model
    if not made.load_best_model_at_end or name is None:
        return
    given = {"loss"}
    if has_classes(task) and validation:
        given |= set(task.score([0] * len(validation), validation))
    if name.removeprefix("eval_") not in given:
        raise RecipeError(
            f"training.metric_for_best_model={shown(name)}: validation has no such score. "
            f"{suggest(name, given)}Scores: {', '.join(sorted(given))}."
        )


def make_trainer(model: Any, prepared: Prepared, made: TrainingArguments) -> Any:
    """A Trainer for a prepared recipe.

    Raises:
        RecipeError: transformers' Trainer refuses an argument.
    """
    task = prepared.task
    validation = prepared.examples.get("validation", [])

    def accuracy(prediction: Any) -> dict[str, float]:
        return task.score(np.argmax(prediction.predictions, -1).tolist(), validation)

    _check_best(task, validation, made)
    try:
        AdapterTrainer.get_optimizer_cls_and_kwargs(made, model)
        if prepared.recipe.trainer == "sft":
            trainer: Any = sft.make_trainer(AdapterTrainer, model, prepared, made)
        else:
            trainer = AdapterTrainer(
                model,
                made,
                data_collator=Collator(pad_id(prepared.tokenizer)),
                train_dataset=prepared.features["train"],
                eval_dataset=prepared.features.get("validation"),
                compute_metrics=accuracy if has_classes(task) else None,
            )
    except Exception as error:
        raise RecipeError(f"training: transformers' Trainer refuses it: {reason(error)}") from error
    trainer.can_return_loss = True
    if has_classes(task):  # their loss is a mean already: it takes no num_items_in_batch
        trainer.model_accepts_loss_kwargs = False
    trainer.add_callback(Clock)
    trainer.add_callback(OftenEnough)
    for printing in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printing)
    if not made.disable_tqdm:
        trainer.add_callback(LossInBar)
    if prepared.recipe.patience:
        trainer.add_callback(EarlyStoppingCallback(prepared.recipe.patience))
    return trainer
