"""Compare the tensors of the base that a PEFT adapter brings with those that its config announces.

    modules_to_save          whole modules, all of whose parameters must be there
    bias                     'all', or 'lora_only' of updated modules
    trainable_token_indices  rows of embeddings
    (nothing)                input and output embeddings, which PEFT saves of a resized vocabulary

A tensor that nothing announces is refused: PEFT writes none, and it would change the base.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.errors import shown
from surgery.formats.foreign import Foreign, option
from surgery.formats.peft_keys import Keys, own_names
from surgery.splicer import reports

# What PEFT adds to modules_to_save for these tasks, whether a model has a module of that name.
_HEADS = ("classifier", "score", "qa_outputs")
_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_BIASES = ("none", "all", "lora_only")


def require_announced(adapter: Foreign, keys: Keys, model: nn.Module, prefix: str) -> None:
    """Raise unless an adapter brings of the base what its config announces.

    Raises:
        StoreError: a tensor is not announced, or an announced one is missing; it is named.
    """
    bias = option(adapter, "bias", "none", str)
    if bias not in _BIASES:
        raise adapter.refuse(f"its config has bias={shown(bias)}, not one of {', '.join(_BIASES)}.")
    if option(adapter, "trainable_token_indices", None, list, dict) and not keys.rows:
        raise adapter.refuse(
            "it lacks the tensors ...token_adapter.trainable_tokens_delta of the rows that its "
            f"config names: {shown(adapter.config['trainable_token_indices'])}."
        )
    inserted = tuple(f"{i.path}." for r in reports(model).values() for i in r.inserted)
    paths = [
        path
        for path, _ in model.named_modules(remove_duplicate=False)
        if path and not f"{path}.".startswith(inserted)
    ]
    whole = _whole(adapter, paths)
    own = {
        alias: name for alias, name in own_names(model).items() if not alias.startswith(inserted)
    }
    for path in whole:
        for alias in own:
            if alias.startswith(f"{path}.") and own[alias] not in keys.base:
                shape = tuple(model.get_parameter(alias).shape)
                raise adapter.refuse(
                    f"it lacks the tensor {prefix}{alias} of shape {shape}, which its config "
                    f"announces by modules_to_save={shown(adapter.config['modules_to_save'])}."
                )
    also = _HEADS if adapter.config.get("task_type") in _TASKS else ()
    places = [*whole, *_embeddings(model), *(p for p in paths if _ends(p, also))]
    heads = tuple(f"{place}." for place in places)
    known = {own[alias] for alias in own if alias.startswith(heads)}
    for name, key in [*keys.base.items(), *keys.copies.items()]:
        trained = bias == "all" and "bias" in name
        trained |= bias == "lora_only" and name.removesuffix(".bias") in keys.modules
        if not (name.startswith(heads) or name in known or trained):
            raise adapter.refuse(
                f"{shown(key)} {tuple(adapter.tensors[key].shape)} is a tensor of the base, "
                f"{shown(name)}, that its config does not announce: modules_to_save is "
                f"{shown(adapter.config.get('modules_to_save'))}, bias is {bias!r}."
            )


def _whole(adapter: Foreign, paths: list[str]) -> list[str]:
    """Return the modules that the config saves whole.

    Raises:
        StoreError: it is no list of names, or the model has no module of a name.
    """
    names: Any = option(adapter, "modules_to_save", [], list)
    if not all(isinstance(name, str) and name for name in names):
        raise adapter.refuse(
            f"its config has modules_to_save={shown(names)}; names of modules must stand there."
        )
    wanted = frozenset(names)
    found = {path: _ends(path, wanted) for path in paths}
    lost = wanted.difference(*found.values(), _HEADS)
    if lost:
        raise adapter.refuse(
            f"its config saves the modules {shown(sorted(lost))} whole, and this model has none of "
            "that name."
        )
    return [path for path, ends in found.items() if ends]


def _ends(path: str, names: Any) -> list[str]:
    """Return those of these names that a path ends with, as PEFT compares them."""
    return [path[at:] for at in range(len(path)) if path[at:] in names]


def _embeddings(model: nn.Module) -> list[str]:
    """Return each path of the embeddings of input and output that a model tells."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name)())
        except (AttributeError, NotImplementedError, TypeError):
            continue
    every = model.named_modules(remove_duplicate=False)
    return [path for path, module in every if path and any(module is each for each in found)]
