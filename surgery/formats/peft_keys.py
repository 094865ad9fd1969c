"""Sort the tensors of a PEFT adapter: by the modules that they update, and those of the base.

base_model.model.X.lora_A.weight                    A of module X          (LoRA, IA3: ia3_l)
base_model.model.X.lora_embedding_A           A of embedding X
base_model.model.X.base_layer.lora_A.weight         A of a parameter of X (peft_parameters.py)
base_model.model.X.token_adapter.trainable_...      rows of embedding X
base_model.model.X.base_layer.bias                  the base's own X.bias
base_model.model.X.weight                           the base's own, in a module to save
base_model.X.weight                                 the same beside a prompt or a prefix
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import shown
from surgery.formats.foreign import Foreign, option
from surgery.formats.peft_parameters import parameter_at, targeted

_PARTS = (
    "lora_A", "lora_B", "ia3_l", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
)  # fmt: skip
_ROWS = "token_adapter"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Keys:
    """The names of an adapter's tensors.

    Attributes:
        modules: for each updated module the names of its tensors by what they are: ``lora_A``,
            ``lora_B``, ``lora_B.bias``, ``lora_embedding_A``, ``lora_embedding_B``,
            ``lora_magnitude_vector``, ``ia3_l``; and for each parameter that is updated by name.
        parameters: those of these that are parameters.
        rows: the tensors of rows, by the path of the embedding.
        base: the tensors of the base, by their names there.
        named: the same by the names of the file, where a tied tensor may have several.
        copies: further tensors of the base, its own beside what is trained, which are not used.
    """

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    rows: dict[str, str] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)


def sorted_keys(adapter: Foreign, model: nn.Module, prefix: str) -> Keys:
    """Sort the tensors of an adapter whose names begin with a prefix.

    Raises:
        StoreError: a tensor has no place here, or two have the same; they are named.
    """
    found, names, chosen = Keys(), own_names(model), targeted(adapter, model)
    for key in adapter.tensors:
        if not key.startswith(prefix):
            raise adapter.refuse(f"the tensor {shown(key)} is named without {prefix!r}.")
        parts = key.removeprefix(prefix).split(".")
        at = next((i for i, part in enumerate(parts) if part in (*_PARTS, _ROWS)), None)
        if at is None:
            _note_base(adapter, found, key, parts, names)
            continue
        path, last = ".".join(parts[:at]), [p for p in parts[at + 1 :] if p != "default"]
        if parts[at] == _ROWS and last in (["trainable_tokens_original"], ["base_layer", "weight"]):
            found.copies[names.get(f"{path}.weight", f"{path}.weight")] = key
        elif parts[at] == _ROWS:
            _require_one(adapter, found.rows.setdefault(path, key), key)
        elif parameter := parameter_at(adapter, key, parts[:at], chosen):
            found.parameters.add(parameter)
            parts_of = found.modules.setdefault(parameter, {})
            _require_one(adapter, parts_of.setdefault(parts[at], key), key)
        elif "base_layer" in parts[:at] or last not in ([], ["weight"], ["bias"]):
            raise adapter.refuse(
                f"{key} updates no module of its own, but a layer that is wrapped twice."
            )
        else:
            what = parts[at] + (".bias" if last == ["bias"] else "")
            _require_one(adapter, found.modules.setdefault(path, {}).setdefault(what, key), key)
    _require_whole_ties(adapter, model, found.named)
    return found


def _require_whole_ties(adapter: Foreign, model: nn.Module, base: Mapping[str, str]) -> None:
    """Raise if a module to save is one of several with one tensor, and the others keep theirs.

    PEFT copies the module, which unties it: the others run with the base's own, or a copy each.
    """
    saved = option(adapter, "modules_to_save", [], list)
    every = dict(model.named_parameters(remove_duplicate=False))
    for name, key in base.items():
        path = name.rpartition(".")[0]
        if not any(isinstance(each, str) and path.endswith(each) for each in saved):
            continue
        alike = [other for other, own in every.items() if own is every.get(name)]
        others = [other for other in alike if other.rpartition(".")[0] != path]
        tensor = adapter.tensors[key]
        for other in others:
            if other not in base or not torch.equal(adapter.tensors[base[other]], tensor):
                raise adapter.refuse(
                    f"PEFT has untied {name} from {other}, which is the same tensor here, and "
                    f"{key} is for the first alone. Untie them in the base "
                    "(tie_word_embeddings=False), or merge it with PEFT's merge_and_unload."
                )


def _require_one(adapter: Foreign, first: str, second: str) -> None:
    """Raise unless these are the same tensor."""
    if first != second:
        listed = " and ".join(f"{k} {tuple(adapter.tensors[k].shape)}" for k in (first, second))
        raise adapter.refuse(f"{listed} are two tensors for one place.")


def _note_base(
    adapter: Foreign, found: Keys, key: str, parts: list[str], names: dict[str, str]
) -> None:
    """Note a tensor of the base, and the base's copy beside a trained module apart."""
    into, also = (
        found.base,
        [part for part in parts if part not in ("base_layer", "original_module")],
    )
    if "original_module" in parts:
        into = found.copies
    elif "modules_to_save" in parts:  # in memory, and beside bias='all'
        at = parts.index("modules_to_save")
        named = [*parts[:at], *parts[at + 1 :]]
        also = named if ".".join(named) in names else [*parts[:at], *parts[at + 2 :]]
    name = ".".join(also)
    if into is found.base:
        found.named.setdefault(name, key)
    first = into.setdefault(names.get(name, name), key)
    if not torch.equal(adapter.tensors[first], adapter.tensors[key]):  # tied ones come twice
        _require_one(adapter, first, key)


def own_names(model: nn.Module) -> dict[str, str]:
    """Return the name in ``named_parameters`` of each parameter, by each name of it."""
    names = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {alias: names[id(p)] for alias, p in every}


def base_tensors_of(adapter: Foreign, keys: Keys, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the base that an adapter brings, by name.

    Copies of the base's own are left out: PEFT saves the table of an embedding that it updates.
    """
    own = dict(model.named_parameters())
    return {
        name: adapter.tensors[key]
        for name, key in keys.base.items()
        if ".base_layer.weight" not in key or not _same(own.get(name), adapter.tensors[key])
    }


def _same(own: Tensor | None, tensor: Tensor) -> bool:
    """Whether a tensor is equal to the base's own."""
    if own is None or own.is_meta or own.shape != tensor.shape:
        return False
    return torch.equal(own.cpu(), tensor.to("cpu", own.dtype))


def rows_of(adapter: Foreign, keys: Keys, model: nn.Module) -> dict[str, tuple[list[int], Tensor]]:
    """Return the rows of embeddings that an adapter brings, with their numbers.

    Raises:
        StoreError: the config names other embeddings or numbers than there are tensors, or numbers
            that the model's table lacks, or the rows are no floats of its width; or a table that
            several modules have has other rows in one of them.
    """
    if not keys.rows:
        return {}
    chosen = option(adapter, "trainable_token_indices", {}, list, dict)
    found: dict[str, tuple[list[int], Tensor]] = {}
    own, names = dict(model.named_parameters()), own_names(model)
    numbered = {path: _numbers(chosen, path) for path in keys.rows}
    for path, key in sorted(keys.rows.items(), key=lambda item: not numbered[item[0]]):
        numbers, rows = numbered[path], adapter.tensors[key]
        name = names.get(f"{path}.weight", f"{path}.weight")
        if (
            name in found
            and torch.equal(found[name][1], rows)
            and (not numbers or numbers == found[name][0])
        ):
            continue  # PEFT has one tensor in all modules that are tied
        if len(numbers) != len(rows) or rows.dim() != 2:
            raise adapter.refuse(
                f"{key} has the shape {tuple(rows.shape)}, and trainable_token_indices names "
                f"{shown(chosen)}: a list of as many different rows of {path} must stand there."
            )
        if name in found:
            raise adapter.refuse(
                f"{key} has other rows of {name} than another of its tensors: these modules have "
                "one table here."
            )
        if name in own:
            _require_rows(adapter, key, numbers, own[name])
            _require_tied(adapter, model, path, own[name])
        found[name] = (numbers, rows)
    return found


def _require_rows(adapter: Foreign, key: str, numbers: list[int], table: Tensor) -> None:
    """Raise unless a table has these rows, in the shape and kind of dtype of a tensor."""
    rows = adapter.tensors[key]
    what = f"{key} has the shape {tuple(rows.shape)}"
    if max(numbers) >= len(table):
        raise adapter.refuse(
            f"{what} and is for the rows {shown(numbers)}, and the table here has the shape "
            f"{tuple(table.shape)}. If they are new tokens, add them first: take the tokenizer "
            "that was saved with the adapter and call "
            "model.resize_token_embeddings(len(tokenizer))."
        )
    if rows.shape[1:] != table.shape[1:]:
        raise adapter.refuse(f"{what}, and the table here has the shape {tuple(table.shape)}.")
    if rows.dtype not in _FLOATS:
        raise adapter.refuse(f"{key} is of {rows.dtype}, where floats must stand.")


def _require_tied(adapter: Foreign, model: nn.Module, path: str, table: Tensor) -> None:
    """Raise if several modules have a table, and PEFT changes it in the one at this path alone."""
    if others := left_by_peft(model, path, table):
        raise adapter.refuse(
            f"it has rows of {path}, and PEFT changes those of that module alone, while here "
            f"{', '.join(others)} is the same table. Untie it from the others first."
        )


def left_by_peft(model: nn.Module, path: str, table: Tensor) -> list[str]:
    """Return the other names of a table in which PEFT leaves the rows that it changes at a path.

    PEFT follows a tie from the embedding of the model's input, where its config tells of ties.
    """
    every = model.named_parameters(remove_duplicate=False)
    config, first = getattr(model, "config", None), getattr(model, "get_input_embeddings", None)
    follows = first is not None and first() is model.get_submodule(path)
    if follows and getattr(config, "tie_word_embeddings", False):
        return []
    return [name for name, own in every if own is table and name != f"{path}.weight"]


def _numbers(chosen: Any, path: str) -> list[int]:
    """Return the numbers of the rows of an embedding; [] if they are none, or not all different."""
    if isinstance(chosen, dict):
        named = (rows for name, rows in chosen.items() if f".{path}".endswith(f".{name}"))
        chosen = next(named, None)
    if not isinstance(chosen, list) or not all(type(n) is int for n in chosen):
        return []
    return chosen if len({*chosen}) == len(chosen) and min(chosen, default=0) >= 0 else []
