"""Read, sample, encode and check the data of a recipe, before any weight is loaded."""

from __future__ import annotations

import dataclasses
import os.path
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

import surgery
from surgery import Example, Features, RecipeError, suggest
from surgery_recipes.recipe_files import Recipe, reason, shown
from surgery_recipes.run.kinds import check_base, has_classes, load_tokenizer, of_images
from surgery_recipes.run.model_source import model_path

FITTED = ("train", "validation")


@dataclass(frozen=True)
class Prepared:
    """A recipe with its task, tokenizer and data.

    Attributes:
        source: the folder or hub id of the base.
        tokenizer: that of the base; the image processor, if the task has images.
        new: the ids of the tokens that were added to the vocabulary.
        examples: the examples of every split.
        features: the encoded examples of the training and the validation split.
        longest: a batch of the longest encoded examples, and one of the longest prompts. Whatever
            is too long for the model fails on these two.
    """

    recipe: Recipe
    task: surgery.Task
    source: str
    tokenizer: Any
    new: tuple[int, ...]
    examples: dict[str, list[Example]]
    features: dict[str, list[Features]]
    longest: tuple[list[Features], list[Features]]

    @property
    def scored(self) -> list[str]:
        """The splits that are scored at the end."""
        if self.recipe.validate_only:
            return ["validation"]
        return [name for name in self.examples if name not in FITTED]


def prepare_run(recipe: Recipe, trust: bool = False) -> Prepared:
    """Read the data of a recipe and check that they suit the model.

    Args:
        recipe: the recipe.
        trust: whether the package of ``model: package:NAME`` may be imported, whatever it is.

    Raises:
        RecipeError: the model is of the wrong kind or not trusted, data are missing, or an
            example is too long.
    """
    base, config = _base(recipe, trust)
    task, tokenizer = base.task, base.tokenizer
    with _told(recipe.task):
        examples = _limited(task.splits(), recipe.limit)
        if recipe.validate_only:
            examples = _fitted(task, examples)
        features = {
            name: [task.encode(example, tokenizer) for example in examples[name]]
            for name in FITTED
            if name in examples
        }
        prompts = {
            name: [task.prompt(example, tokenizer) for example in examples[name]]
            for name in examples
            if name not in FITTED or (recipe.validate_only and name == "validation")
        }
    if has_classes(task) and not recipe.validate_only:
        _check_scored(task, [e for n, rows in examples.items() if n not in FITTED for e in rows])
    for name, rows in features.items():
        _check_room(rows, name, config, task, 0)
        _check_rows(rows, name, recipe)
    for name, rows in prompts.items():
        _check_room(rows, name, config, task, task.decoding.get("max_new_tokens", 0))
    longest = (
        _longest([row for rows in features.values() for row in rows]),
        _longest([row for rows in prompts.values() for row in rows]),
    )
    return dataclasses.replace(base, examples=examples, features=features, longest=longest)


def main_score(recipe: Recipe, scores: Mapping[str, Any]) -> str:
    """The name of the score that a run is judged by: the task's, or one that validation has.

    Validation may lack the task's main score, as MNLI's has no mismatched examples. Then it is
    ``training.metric_for_best_model``, or else the first score.
    """
    best = str(recipe.training.get("metric_for_best_model", "")).removeprefix("eval_")
    names = (surgery.tasks()[recipe.task].metric, best)
    return next((name for name in names if name in scores), next(iter(scores)))


def prepare_base(recipe: Recipe, trust: bool = False) -> Prepared:
    """A recipe with its task and tokenizer, and none of its data.

    Raises:
        RecipeError: the model is of the wrong kind or not trusted.
    """
    return _base(recipe, trust)[0]


def _base(recipe: Recipe, trust: bool) -> tuple[Prepared, Any]:
    """What is known before the data are read, and the configuration of the base."""
    with _told(recipe.task):
        task = _task(recipe)
    if recipe.baseline and not has_classes(task):
        raise RecipeError(
            f"baseline: task {task.name!r} has no new head that could be trained alone. Leave "
            "baseline out."
        )
    if recipe.trainer == "sft" and (has_classes(task) or task.segments):
        raise RecipeError(
            f"trainer=sft: task {task.name!r} has "
            + ("segments" if task.segments else "classes")
            + ", and TRL's SFTTrainer learns plain texts. Leave trainer out."
        )
    if of_images(task) and recipe.training.get("train_sampling_strategy") == "group_by_length":
        raise RecipeError(
            "training.train_sampling_strategy=group_by_length: images have no length. Leave it out."
        )
    source = model_path(recipe.model, trust)
    config = _config(source, task)
    tokenizer = load_tokenizer(source, task)
    new = [] if of_images(task) else _added(task, tokenizer)
    made = Prepared(recipe, task, source, tokenizer, tuple(new), {}, {}, ([], []))
    return made, config


def _added(task: surgery.Task, tokenizer: Any) -> list[int]:
    """Add the tokens of a task to a tokenizer, and return the ids of those that it lacked."""
    before = set(tokenizer.get_vocab())
    tokenizer.add_special_tokens({"additional_special_tokens": list(task.tokens)})
    lacked = [token for token in task.tokens if token not in before]
    return list(tokenizer.convert_tokens_to_ids(lacked))


@contextmanager
def _told(task: str) -> Iterator[None]:
    """Turn what a task raises into an error of a few lines. A task is a plugin."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(reason(error)) from error
    except Exception as error:
        raise RecipeError(f"task {shown(task)} fails: {reason(error)}") from error


def _task(recipe: Recipe) -> surgery.Task:
    """The task of a recipe; an option whose default is a text must be a text."""
    cls = surgery.tasks().get(recipe.task)
    for option in dataclasses.fields(cls) if cls else ():
        given = recipe.data.get(option.name, option.default)
        if isinstance(option.default, str) and not isinstance(given, str):
            raise RecipeError(f"data.{option.name}={shown(given)} must be a text.")
    return surgery.task(recipe.task, **recipe.data)


def _config(source: str, task: surgery.Task) -> Any:
    """The configuration of the base.

    Raises:
        RecipeError: there is none, or the base is not of the kind that the task needs.
    """
    here = os.path.isdir(source)
    meant = os.path.isabs(source) or source.startswith(".") or source.count("/") > 1
    if meant and not here:
        raise RecipeError(f"model {shown(source)}: no such folder.")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        also = "" if here else ", and there is no such folder here"
        raise RecipeError(
            f"model {shown(source)} cannot be loaded{also}: {reason(error)}"
        ) from error
    check_base(config, source, task)
    return config


def _fitted(task: surgery.Task, splits: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """The splits of a run that only validates: nothing that is tested on."""
    if "validation" not in splits:
        raise RecipeError(
            f"task {task.name!r} has no validation split, so nothing can be chosen on it. Hold "
            f"examples out, or choose by hand. Splits: {', '.join(splits)}."
        )
    return {name: splits[name] for name in FITTED}


def _limited(splits: dict[str, list[Example]], limit: dict[str, Any]) -> dict[str, list[Example]]:
    for name, count in limit.items():
        if name not in splits:
            raise RecipeError(
                f"limit: no split {shown(name)}. {suggest(name, splits)}"
                f"Splits: {', '.join(splits)}."
            )
        if type(count) is not int or count < 1:
            raise RecipeError(
                f"limit: {name}={shown(count)} must be a number of examples, 1 or more."
            )
    drawn = {}
    for name, examples in splits.items():
        if not examples:
            raise RecipeError(f"split {name!r} has no examples.")
        count = min(limit.get(name, len(examples)), len(examples))
        chosen = sorted(random.Random(0).sample(range(len(examples)), count))
        drawn[name] = [examples[i] for i in chosen]
    return drawn


def _check_scored(task: surgery.Task, examples: list[Example]) -> None:
    if task.metric not in task.score([0] * len(examples), examples):
        raise RecipeError(
            f"{task.metric!r} cannot be computed from the {len(examples)} scored examples: their "
            "sample misses a kind of example. Raise the limit of their split, or leave it "
            "out."
        )


def _check_room(
    rows: list[Features], split: str, config: Any, task: surgery.Task, written: int
) -> None:
    room = getattr(config, "max_position_embeddings", None)
    if room is None or task.kind != "decoder":
        return
    for number, row in enumerate(rows):
        needed = len(row["input_ids"]) + written
        if needed > room:
            raise RecipeError(
                f"{split}, example {number + 1}: {len(row['input_ids'])} tokens"
                + (f" and {written} to generate" if written else "")
                + f", but the model has {room} positions. Shorten the example or remove it, lower "
                "data.max_new_tokens if the example is scored, or take a model with more positions."
            )


def _check_rows(rows: list[Features], split: str, recipe: Recipe) -> None:
    """Raise if SFTTrainer would cut an example, as it cuts answers first."""
    if recipe.trainer != "sft":
        return
    room = recipe.training.get("max_length")
    if room is None and recipe.training.get("packing"):
        raise RecipeError(
            "training.packing fills rows of training.max_length tokens. Set that, too, such as "
            "1024."
        )
    for number, row in enumerate(rows):
        if isinstance(room, int) and len(row["input_ids"]) > room:
            raise RecipeError(
                f"{split}, example {number + 1}: {len(row['input_ids'])} tokens, but rows of "
                f"training.max_length={room}. Raise that, or lower data.max_length."
            )


def _longest(features: Sequence[Features], count: int = 2) -> list[Features]:
    """The longest features; the first ones of images, which all have one size."""
    return sorted(features, key=lambda f: len(f.get("input_ids", ())), reverse=True)[:count]
