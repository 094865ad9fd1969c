"""Count what a recipe would insert, on a model without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

import surgery
from surgery import SurgeryError
from surgery_recipes.recipe_files import Recipe
from surgery_recipes.run.build import insert, load_base, planned_methods
from surgery_recipes.run.kinds import has_classes, of_images
from surgery_recipes.run.prepare import Prepared, prepare_base


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        base: those of the base, with its head and the rows of new tokens.
        trained: those of inserted modules.
        stored: those of inserted modules that a saved adapter holds.
    """

    base: int
    trained: int
    stored: int


class Counter:
    """Counts parameters of recipes that differ in their methods alone.

    The base is built once, on the meta device: it takes neither memory nor a download of weights.
    A method that needs values, such as one that looks for the token embedding by what it returns,
    is counted on the base itself.

    Args:
        recipe: any of these recipes.
        trust: whether the package of ``model: package:NAME`` may be imported, whatever it is.

    Raises:
        RecipeError: the base has no configuration or tokenizer, or does not suit the task.
    """

    def __init__(self, recipe: Recipe, trust: bool = False) -> None:
        self.prepared = prepare_base(recipe, trust)
        self.model = _without_weights(self.prepared)
        self.sites: Any = None
        self.whole = False

    def count(self, recipe: Recipe) -> Counts:
        """The counts of a recipe.

        Raises:
            SurgeryError: a method refuses its options, or does not suit the model.
        """
        methods = planned_methods(recipe)
        if not self.whole:
            try:
                return self._counted(methods)
            except SurgeryError:
                self.model = load_base(self.prepared, 0)
                self.sites, self.whole = None, True
        return self._counted(methods)

    def _counted(self, methods: Any) -> Counts:
        if methods and self.sites is None:
            self.sites = surgery.locate(self.model)
        try:
            if methods:
                insert(self.model, methods, self.sites)
            found = surgery.summary(self.model)
            return Counts(found.base, found.inserted, found.stored)
        finally:  # the second method of a row may have been refused
            for report in reversed(surgery.summary(self.model).reports):
                surgery.remove(self.model, report.name)


def _without_weights(prepared: Prepared) -> Any:
    task = prepared.task
    config = AutoConfig.from_pretrained(prepared.source)
    auto: Any = AutoModelForCausalLM
    if has_classes(task):
        auto, config.num_labels = AutoModelForSequenceClassification, len(task.labels)
    if of_images(task):
        auto = AutoModelForImageClassification
    with torch.device("meta"):
        model = auto.from_config(config)
        size = 0 if of_images(task) else len(prepared.tokenizer)
        if size and size > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(size, mean_resizing=False)
    return model
