"""Load the model of a recipe, add its head and new tokens, and splice its methods in."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    set_seed,
)

import surgery
from surgery import MethodError, RecipeError
from surgery_recipes.recipe_files import Recipe, reason, shown
from surgery_recipes.run.answers import pad_id
from surgery_recipes.run.collate import Collator
from surgery_recipes.run.kinds import of_images
from surgery_recipes.run.prepare import Prepared

Plan = list[tuple[surgery.Method, dict[str, Any]]]


def planned_methods(recipe: Recipe) -> Plan:
    """The methods of a recipe, each with its entry, which says where it goes.

    Raises:
        MethodError: there is no such method, or it has no such option.
        RecipeError: ``at`` or ``layers`` of an entry is not a place.
    """
    made = []
    for entry in recipe.splice:
        if entry.get("at") not in (None, "attention", "ffn"):
            raise RecipeError(f"splice entry {shown(entry)}: at must be attention or ffn.")
        layers = entry.get("layers", [0, 1])
        if not isinstance(layers, list) or [type(x) for x in layers] != [int, int]:
            raise RecipeError(
                f"splice entry {shown(entry)}: layers must be [first, last + 1], two whole numbers."
            )
        options = {k: v for k, v in entry.items() if k not in ("method", "at", "layers")}
        made.append((_method(entry["method"], options), entry))
    return made


def _method(name: str, options: dict[str, Any]) -> surgery.Method:
    try:
        return surgery.method(name, **options)
    except MethodError as error:
        raise MethodError(reason(error)) from error
    except Exception as error:  # a method is a plugin: it may raise anything at a wrong option
        raise MethodError(
            f"method {shown(name)} cannot be made with {shown(options)}: {reason(error)}"
        ) from error


def load_base(prepared: Prepared, seed: int, source: str = "") -> Any:
    """The base with the head of the task, and with embedding rows for the task's new tokens.

    transformers draws new rows around the mean of the old ones; ``seed`` makes them the same each
    time. Weights are float32, or of the dtype of the files if the recipe's ``dtype`` is ``auto``.

    Raises:
        RecipeError: ``source``, or the base of the recipe if it is "", cannot be loaded.
    """
    set_seed(seed)
    task, source = prepared.task, source or prepared.source
    dtype: Any = torch.float32 if prepared.recipe.dtype == "float32" else "auto"
    more = _quantized(prepared.recipe.quantize)
    try:
        if task.kind == "decoder":
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **more)
        else:
            names = dict(enumerate(task.labels))
            auto: Any = AutoModelForSequenceClassification
            if of_images(task):
                auto = AutoModelForImageClassification
                more["ignore_mismatched_sizes"] = True  # a head of ImageNet's classes makes way
            model = auto.from_pretrained(
                source, num_labels=len(names), id2label=names, dtype=dtype, **more
            )
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(
            f"model {shown(source)} cannot be loaded for this task: {reason(error)}"
        ) from error
    if task.kind == "classifier":
        model.config.pad_token_id = pad_id(prepared.tokenizer)
    if not of_images(task):
        grow_vocabulary(model, len(prepared.tokenizer))
    return model


def _quantized(how: str) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that quantise the base, its head excepted."""
    if not how:
        return {}
    options: dict[str, Any] = {"load_in_8bit": True}
    if how == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        options |= {"bnb_4bit_use_double_quant": True}
    heads = [".*pooler", "classifier", "score", "lm_head"]  # what a base may have no weights for
    config = BitsAndBytesConfig(**options, llm_int8_skip_modules=heads)
    return {"quantization_config": config}


def fresh_parameters(model: nn.Module) -> list[str]:
    """The names of parameters that ``from_pretrained`` found no weights for, such as a new head."""
    loaded = {n for n, p in model.named_parameters() if getattr(p, "_is_hf_initialized", False)}
    return [n for n, _ in model.named_parameters() if n not in loaded] if loaded else []


def grow_vocabulary(model: Any, size: int) -> None:
    """Give the embeddings at least ``size`` rows.

    Resizing replaces the parameters of the embeddings. The new ones are marked as loaded, as the
    old ones were, so that an output embedding is not taken for a fresh head and trained.
    """
    if size <= model.get_input_embeddings().weight.shape[0]:
        return
    fresh = fresh_parameters(model)
    model.resize_token_embeddings(size)
    for name, parameter in model.named_parameters():
        if name not in fresh:
            parameter._is_hf_initialized = True


def splice(model: Any, prepared: Prepared, methods: Plan) -> None:
    """Splice methods in and freeze the base; without methods, leave the whole model trainable.

    Of a recipe that is ``frozen`` nothing but a fresh head stays trainable.

    Raises:
        RecipeError: the model does not have the layers of an entry.
        SpliceError: a method does not suit the model.
    """
    if prepared.recipe.frozen:
        freeze_all_but_head(model)
    if not methods:
        return
    insert(model, methods)
    recipe = prepared.recipe
    surgery.freeze_base(model, keep=recipe.keep, fresh=recipe.train_head)
    if prepared.new:
        for name in embedding_names(model):
            surgery.train_rows(model, name, prepared.new)


def insert(model: Any, methods: Plan, sites: surgery.Sites | None = None) -> None:
    """Splice methods in where their entries say, and freeze nothing.

    ``sites`` are those of the model, if they are known already.

    Raises:
        RecipeError: the model does not have the layers of an entry.
        SpliceError: a method does not suit the model.
    """
    sites = surgery.locate(model) if sites is None else sites
    for index, (method, entry) in enumerate(methods):
        chosen = getattr(sites, entry["at"]) if entry.get("at") else sites
        if "layers" in entry:
            first, end = entry["layers"]
            there = {site.layer for site in chosen if site.layer is not None}
            if not first < end or not set(range(first, end)) <= there:
                raise RecipeError(
                    f"splice entry {shown(entry)}: layers must be [first, last + 1] of this "
                    f"model's layers {min(there, default=0)} to {max(there, default=0)}."
                )
            chosen = chosen.layers(first, end)
        name = "default" if index == 0 else f"step{index + 1}"
        surgery.splice(model, method, at=chosen, name=name)


def freeze_all_but_head(model: nn.Module) -> None:
    """Freeze everything except the fresh head, for a base that is not trained."""
    fresh = fresh_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in fresh)


def embedding_names(model: Any) -> list[str]:
    """The names of the input and the output embedding; one name if they are tied."""
    modules = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
    weights = {id(module.weight) for module in modules}
    return [name for name, p in model.named_parameters() if id(p) in weights]


def fits_to_data(model: Any) -> bool:
    """Whether a method of this model initialises itself from data."""
    methods = [m for report in surgery.summary(model).reports for m in report.methods]
    return any(type(method).fit is not surgery.Method.fit for method in methods)


def trainable(model: nn.Module) -> int:
    """How many numbers training may change, counting only the trained rows of an embedding."""
    return surgery.summary(model).trainable


def try_out(model: Any, prepared: Prepared) -> float:
    """Run the longest examples through the model once, and return their loss.

    Raises:
        RecipeError: the model fails on them, or the loss is not finite.
    """
    loss = loss_of_longest(model, prepared)
    if not math.isfinite(loss):
        raise RecipeError(
            f"the loss of the longest examples is {loss}, not a finite number. The weights of the "
            "base may be damaged. Download the base again."
        )
    return loss


def loss_of_longest(model: Any, prepared: Prepared) -> float:
    """The loss of the longest examples, which is not finite if training has diverged.

    Raises:
        RecipeError: the model fails on them.
    """
    collate = Collator(pad_id(prepared.tokenizer))
    examples, prompts = (
        {name: tensor.to(model.device) for name, tensor in collate(features).items()}
        for features in prepared.longest
    )
    model.eval()
    try:
        with torch.no_grad():
            loss = float(model(**examples).loss)
            model(**prompts)
    except (IndexError, RuntimeError, ValueError) as error:
        raise RecipeError(
            f"{_described(examples, prompts)} do not go through the model: {reason(error)}. "
            + (
                "Take a model for images of this size."
                if of_images(prepared.task)
                else "Lower data.max_length, or take a model with more positions."
            )
        ) from error
    finally:
        model.train()
    return loss


def _described(examples: dict[str, Any], prompts: dict[str, Any]) -> str:
    if "pixel_values" in examples:
        return f"the first images ({list(examples['pixel_values'].shape)})"
    learnt, asked = (batch["input_ids"].shape[1] for batch in (examples, prompts))
    return f"the longest examples ({learnt} tokens to learn, {asked} to answer)"
