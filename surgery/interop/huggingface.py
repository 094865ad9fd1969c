"""Hold the library's knowledge of transformers: attention functions, inputs and flags of models.

No function here is the first to import transformers: in a process that has not imported it there is
no transformers model to ask about.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from surgery.interop.isolation import every_module


def _loaded() -> bool:
    return "transformers.modeling_utils" in sys.modules


def is_pretrained(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers model."""
    if not _loaded():
        return False
    from transformers.modeling_utils import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def attention_patch(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> list[Any]:
    """Return replacements by which transformers uses ``wrap(function)`` as attention function.

    They patch the look-up by ``config._attn_implementation``, which every attention module of
    transformers does in its forward; see ``AttentionPatch``.
    """
    if not _loaded():
        return []
    from transformers.modeling_utils import AttentionInterface

    def choose(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_interface(interface: Any, implementation: str, default: Any) -> Any:
            return wrap(original(interface, implementation, default))

        return get_interface

    return [(AttentionInterface, "get_interface", choose)]


def is_own_hook(hook: Callable[..., Any]) -> bool:
    """Whether a forward hook is one of those by which transformers collects its outputs."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def choices(module: nn.Module) -> list[tuple[Any, str]]:
    """Return where the choice of attention function is stored, as (object, attribute name).

    One pair for each config that the module or a submodule has. A graph holds one choice, so a
    captured graph is valid only as long as these attributes keep their values.
    """
    configs: dict[int, Any] = {}
    for part in module.modules():
        config = vars(part).get("config")
        if config is not None and hasattr(config, "_attn_implementation"):
            configs[id(config)] = config
    own = "_attn_implementation_internal"
    return [(c, own if own in vars(c) else "_attn_implementation") for c in configs.values()]


@contextmanager
def without_checkpointing(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Switch gradient checkpointing off inside the ``with`` block; give the modules that had it.

    A method may run the model a second time inside a forward, as prompt-tuning does. Checkpointing
    would repeat that run in the backward pass, when the method can no longer tell which of its two
    runs is being repeated.

    Example:
        ``with surgery.without_checkpointing(model): model(**inputs)``
    """
    on = [m for m in every_module(module) if vars(m).get("gradient_checkpointing") is True]
    try:
        for each in on:
            vars(each)["gradient_checkpointing"] = False
        yield on
    finally:
        for each in on:
            vars(each)["gradient_checkpointing"] = True


def fresh_parameters(model: nn.Module) -> list[str]:
    """Return the names of parameters that ``from_pretrained`` found no weights for.

    A new classification head is an example. Empty if the model was not loaded that way. A weight of
    a class of its own, as torchao's, or of whole numbers, as hqq's, was made from one that was
    loaded.
    """
    if not is_pretrained(model):
        return []
    loaded = {n for n, p in model.named_parameters() if getattr(p, "_is_hf_initialized", False)}
    fresh = [
        name
        for name, p in model.named_parameters()
        if name not in loaded and type(p) is nn.Parameter and p.is_floating_point()
    ]
    return fresh if loaded else []


def call_loaded(parameters: Iterable[nn.Parameter]) -> None:
    """Note that these parameters hold what was loaded, as copies of loaded ones do."""
    for parameter in parameters:
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def name_or_path(model: nn.Module) -> str | None:
    """Return the hub id or folder that the model was loaded from, or None."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def save_config(model: nn.Module, folder: Path, instead: str) -> None:
    """Write the config of a model to a folder that holds an adapter of it, and no weights.

    A tokenizer can be loaded from the folder then. ``from_pretrained`` of a model raises an error
    that ends in ``instead``: it takes ``transformers_weights`` for the name of a file.
    """
    config: Any = model.config
    found = {**json.loads(config.to_json_string()), "transformers_weights": instead}
    (folder / "config.json").write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")


def follow_trainers(events: Mapping[str, Callable[..., None]], load: bool = False) -> None:
    """Let every ``Trainer`` that is made from now on call functions at its events.

    Args:
        events: by the name of the event, ``act(model, args, state, optimizer)``. The same object
            is followed once.
        load: import ``Trainer``; else nothing is noted where it has not been imported.
    """
    if load and _loaded():
        importlib.import_module("transformers.trainer")
    trainer = sys.modules.get("transformers.trainer")
    if trainer is None or any(getattr(c, "events", 0) is events for c in trainer.DEFAULT_CALLBACKS):
        return
    from transformers import TrainerCallback

    def calling(act: Callable[..., None]) -> Callable[..., None]:
        def event(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
            act(given["model"], args, state, given.get("optimizer"))

        return event

    body = {name: calling(act) for name, act in events.items()}
    made = type("FollowedBySurgery", (TrainerCallback,), {**body, "events": events})
    trainer.DEFAULT_CALLBACKS.append(made)


def growing_layer(cache: Any, index: int) -> Any:
    """Return a layer of a KV cache, if it holds tokens and grows by concatenation; else None.

    Its ``update`` then sets ``keys`` and ``values`` (B, G, m, d) to longer ones, and does no more.
    """
    kind: Any = type(cache)
    if not _updates_layers(kind) or cache.offloading or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    kind = type(layer)
    return layer if _grows(kind) and layer.get_seq_length() > 0 else None


@functools.cache
def _updates_layers(kind: Any) -> bool:
    """Whether ``update`` of a cache is that of its layer, if nothing is offloaded."""
    if not _loaded():
        return False
    from transformers.cache_utils import Cache

    return getattr(kind, "update", None) is Cache.update


@functools.cache
def _grows(kind: Any) -> bool:
    from transformers.cache_utils import DynamicLayer

    return kind is DynamicLayer


def let_train(model: nn.Module, adapted: bool) -> None:
    """Tell ``Trainer`` that a quantised model has something to train, or no longer has.

    ``Trainer`` refuses a quantised model unless PEFT adapted it or its quantizer can train it. A
    quantizer whose weights let no gradient through is refused all the same.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    kind: Any = type(quantizer)
    if adapted and not quantizer.is_qat_trainable:
        quantizer.__class__ = _trainable(kind)
    elif not adapted and "_surgery_original" in vars(kind):
        quantizer.__class__ = kind._surgery_original


def set_tied(model: nn.Module, tied: bool) -> bool:
    """Note in a model's configuration whether embedding and head are one; return what it said."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    said = bool(getattr(text, "tie_word_embeddings", False))
    for each in (config, text):
        if hasattr(each, "tie_word_embeddings"):
            each.tie_word_embeddings = tied
    return said


@functools.cache
def _trainable(kind: Any) -> Any:
    """Return a subclass of a quantizer's class that says that its model can be trained."""

    def reduce(self: Any, protocol: Any) -> Any:  # copies and pickles have the original class
        return object.__new__, (kind,), vars(self)

    body = {"is_qat_trainable": True, "_surgery_original": kind, "__reduce_ex__": reduce}
    return type(kind.__name__, (kind,), {**body, "__module__": kind.__module__})
