"""Estimate how long a run takes, from a few of its steps and answers."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from surgery_recipes.recipe_files import Recipe
from surgery_recipes.run.answers import answers, pad_id
from surgery_recipes.run.build import load_base, planned_methods, splice
from surgery_recipes.run.collate import Collator
from surgery_recipes.run.prepare import prepare_run
from surgery_recipes.run.trainer import training_arguments

TRIED = 3  # steps, after one that is not counted


@dataclass(frozen=True)
class Cost:
    """What a run takes on this machine, about.

    Attributes:
        steps: the steps of the optimiser.
        step: seconds of one of them.
        scoring: seconds of the answers at the end.
    """

    steps: int
    step: float
    scoring: float

    @property
    def seconds(self) -> float:
        return self.steps * self.step + self.scoring


def cost(recipe: Recipe, trust: bool = False) -> Cost:
    """Time some training steps, and one batch of answers, of the model of a recipe.

    Validations within training are not counted, nor is the time to load the model.
    """
    prepared, made = prepare_run(recipe, trust), training_arguments(recipe)
    model = load_base(prepared, made.seed)
    splice(model, prepared, planned_methods(recipe))
    model.to(made.device)
    features = prepared.features["train"]
    batch, parts = made.per_device_train_batch_size, made.gradient_accumulation_steps
    steps = made.max_steps
    if steps <= 0:
        steps = math.ceil(made.num_train_epochs * math.ceil(len(features) / (batch * parts)))
    drawn, collate, seconds = random.Random(0), Collator(pad_id(prepared.tokenizer)), []
    for _ in range(TRIED + 1):
        start = time.perf_counter()
        for _ in range(parts):
            _step(model, collate(drawn.choices(features, k=batch)), made)
        seconds.append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    size, scoring = made.per_device_eval_batch_size, 0.0
    for name in prepared.scored:
        examples = prepared.examples[name]
        some = drawn.choices(examples, k=min(size, len(examples)))
        start = time.perf_counter()
        answers(model, prepared.task, prepared.tokenizer, some, size, Console(quiet=True))
        scoring += (time.perf_counter() - start) * len(examples) / len(some)
    return Cost(steps, sorted(seconds[1:])[TRIED // 2], scoring)


def _step(model: Any, batch: dict[str, torch.Tensor], made: Any) -> None:
    """Run one batch forward and backward."""
    model.train()
    inputs = {name: x.to(made.device) for name, x in batch.items()}
    with torch.autocast(made.device.type, dtype=torch.bfloat16, enabled=bool(made.bf16)):
        loss = model(**inputs).loss
    loss.backward()
