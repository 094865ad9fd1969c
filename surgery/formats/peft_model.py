"""Read a ``peft.PeftModel`` in hand: the base inside its wrappers, and each of its adapters.

PEFT replaces modules by wrappers that hold them. They are known by the names of their classes, so
nothing of PEFT is imported here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.formats.foreign import Foreign
from surgery.formats.peft_lora import PREFIX
from surgery.formats.peft_prompts import TABLE

Wrapped = tuple[nn.Module, str, nn.Module, nn.Module]  # parent, name, wrapper, what it holds
_ADAPTER_KEYS = (
    "lora_A", "lora_B", "ia3_l", "trainable_tokens_delta", "lora_magnitude_vector",
    "lora_embedding_A", "lora_embedding_B",
)  # fmt: skip


def base_of(model: Any) -> nn.Module:
    """Return the base inside a PeftModel, with its wrappers.

    Raises:
        SpliceError: this is no PeftModel.
    """
    if not isinstance(getattr(model, "peft_config", None), dict) or not _is(model, "PeftModel"):
        raise SpliceError(
            f"{type(model).__name__} is no peft.PeftModel. surgery.load reads a folder that PEFT "
            "has saved."
        )
    base: nn.Module = model.get_base_model()
    return base


def wrappers(base: nn.Module) -> Iterator[tuple[str, Wrapped]]:
    """Yield PEFT's outermost wrappers in a base, with their paths.

    Raises:
        SpliceError: an adapter is merged into what a wrapper holds.
    """
    inside: tuple[str, ...] = ()
    for path, module in list(base.named_modules()):
        if f"{path}.".startswith(inside) or not _is_wrapper(module):
            continue
        inside = (*inside, f"{path}.")
        held: Any = module
        while _is_wrapper(held):
            if getattr(held, "merged", False):
                raise SpliceError(
                    f"an adapter is merged into {path}. Call unmerge_adapter() of the PeftModel "
                    "first."
                )
            held = held.base_layer if _is(held, "BaseTunerLayer") else held.original_module
        parent, _, name = path.rpartition(".")
        yield path, (base.get_submodule(parent), name, module, held)


def _is_wrapper(module: nn.Module) -> bool:
    return _is(module, "BaseTunerLayer") or _is(module, "AuxiliaryTrainingWrapper")


def _is(thing: Any, name: str) -> bool:
    """Whether an object is of PEFT's class of this name."""
    return any(
        c.__name__ == name and c.__module__.split(".")[0] == "peft" for c in type(thing).mro()
    )


def adapters_of(model: Any, found: list[tuple[str, Wrapped]]) -> dict[str, Foreign]:
    """Return each adapter of a PeftModel as a folder would hold it, the active ones last."""
    active = list(model.active_adapters)
    names = sorted(model.peft_config, key=lambda name: name in active)
    return {name: _adapter(model, name, found) for name in names}


def _adapter(model: Any, name: str, found: list[tuple[str, Wrapped]]) -> Foreign:
    own = model.peft_config[name]
    config = json.loads(json.dumps(own.to_dict(), default=_plain))
    tabled = bool(getattr(own, "is_prompt_learning", False))
    prefix = "base_model." if tabled else PREFIX
    tensors: dict[str, Tensor] = {}
    for path, (_, _, wrapper, _) in found:
        for key, tensor in wrapper.state_dict().items():
            parts = key.split(".")
            at = next(
                (i for i, p in enumerate(parts) if p in (*_ADAPTER_KEYS, "modules_to_save")), -1
            )
            if at >= 0 and parts[at + 1 : at + 2] == [name]:
                kept = [*parts[:at], *([parts[at]] if parts[at] in _ADAPTER_KEYS else [])]
                tensors[".".join([prefix + path, *kept, *parts[at + 2 :]])] = tensor.detach().cpu()
    if tabled:
        tensors[TABLE] = model.get_prompt_embedding_to_save(name)
    elif config.get("peft_type") == "LORA":
        _note_scales(config, name, found)
        tensors |= _biases(config.get("bias"), name, base_of(model), found)
    return Foreign(f"the PeftModel ({name!r})", config, tensors)


def _plain(value: Any) -> Any:
    """Return a value of a config as JSON would hold it."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _note_scales(config: dict[str, Any], name: str, found: list[tuple[str, Wrapped]]) -> None:
    """Write the scale of each module into the config; it can be changed at run time."""
    alphas = {}
    for path, wrapper in _updating(found):
        scale, rank = (getattr(wrapper, what, {}).get(name) for what in ("scaling", "r"))
        if scale is not None and rank:
            alphas[path] = scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
    if len({round(a, 9) for a in alphas.values()}) == 1:
        config["lora_alpha"], config["alpha_pattern"] = next(iter(alphas.values())), {}
    else:
        config["alpha_pattern"] = {f"^{path}": alpha for path, alpha in alphas.items()}


def _updating(found: list[tuple[str, Wrapped]]) -> Iterator[tuple[str, Any]]:
    """Yield PEFT's wrappers with the paths of the modules, or parameters, that they update."""
    for path, (_, _, wrapper, _) in found:
        inner: Any = wrapper
        while _is(inner, "ParamWrapper"):
            yield f"{path}.{inner.parameter_name}", inner
            inner = inner.base_layer
        if inner is wrapper:
            yield path, wrapper


def _biases(
    which: Any, name: str, base: nn.Module, found: list[tuple[str, Wrapped]]
) -> dict[str, Tensor]:
    """Return the base's biases that were trained along, which a wrapped model holds in place."""
    held = {id(layer): path for path, (_, _, _, layer) in found}
    updated = {
        path for path, (_, _, wrapper, _) in found if name in getattr(wrapper, "scaling", {})
    }
    biases: dict[str, Tensor] = {}
    for path, module in base.named_modules():
        own = held.get(id(module), path)
        bias = dict(module.named_parameters(recurse=False)).get("bias")
        trained = which == "all" or (which == "lora_only" and own in updated)
        inside = any(part in (*_ADAPTER_KEYS, "modules_to_save") for part in path.split("."))
        if bias is not None and trained and not inside:
            biases[f"{PREFIX}{own}.bias"] = bias.detach().cpu()
    return biases
