"""What the kinds of a task differ in: the base that they need, and what makes features of examples.

    classifier         a base with a text classifier of transformers; a tokenizer
    image_classifier   a base with an image classifier of transformers; an image processor
    decoder            a base that writes from left to right; a tokenizer

An image processor stands wherever a tokenizer does.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoImageProcessor,
    AutoTokenizer,
)

import surgery
from surgery import RecipeError
from surgery_recipes.recipe_files import reason, shown


def has_classes(task: surgery.Task) -> bool:
    """Whether a model answers with the number of a class, by a new head."""
    return task.kind != "decoder"


def of_images(task: surgery.Task) -> bool:
    """Whether features are ``pixel_values``, not ``input_ids``."""
    return task.kind == "image_classifier"


def check_base(config: Any, source: str, task: surgery.Task) -> None:
    """Raise unless a base of this configuration is of the kind that the task needs.

    Raises:
        RecipeError: it is not, or does not look segments up as the task needs it.
    """
    what = f"model {shown(source)} ({config.model_type})"
    if task.kind == "classifier" and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise RecipeError(
            f"{what} cannot take a classification head, which task {task.name!r} needs. "
            "Take an encoder such as FacebookAI/roberta-base."
        )
    if of_images(task) and type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise RecipeError(
            f"{what} cannot classify images, as task {task.name!r} needs it. Take a model such as "
            "google/vit-base-patch16-224-in21k."
        )
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder
    if task.kind == "decoder" and (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or encoder):
        raise RecipeError(
            f"{what} does not write text from left to right, which task {task.name!r} needs. "
            "Take a decoder such as openai-community/gpt2."
        )
    if task.segments and not _adds_segments(config):
        raise RecipeError(
            f"{what} does not look segments up in its token embedding. "
            "Set data.with_segments=false."
        )


def _adds_segments(config: Any) -> bool:
    """Whether the model looks ``token_type_ids`` up in its token embedding, as GPT-2 does."""
    forward = inspect.signature(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].forward)
    return "token_type_ids" in forward.parameters and not hasattr(config, "type_vocab_size")


def load_tokenizer(source: str, task: surgery.Task) -> Any:
    """The tokenizer of a base, or its image processor.

    Raises:
        RecipeError: it has none that loads, or the tokenizer cannot pad.
    """
    what, auto = ("tokenizer", AutoTokenizer)
    if of_images(task):
        what, auto = ("image processor", AutoImageProcessor)
    try:
        made = auto.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(
            f"model {shown(source)} has no {what} that loads: {reason(error)}"
        ) from error
    if not of_images(task) and made.pad_token_id is None and made.eos_token_id is None:
        raise RecipeError(
            f"model {shown(source)}: its tokenizer has neither a padding nor an end token. "
            "Set one in its tokenizer_config.json."
        )
    return made
