"""Translate what the adapters library of AdapterHub saves: LoRA and bottleneck adapters.

    X.loras.NAME.lora_A, lora_B                      loralib.py has their layout
    X.adapters.NAME.adapter_down.0.weight ...        A(h) = f(h W_d + b_d) W_u + b_u

A bottleneck stands at X, the module of a sub-layer's output projection, or the one of that name in
a block. What its config asks for has the same mathematics here where it reads what the sub-layer
gives, before the residual is added: Houlsby's and its halves; He's beside an FFN without a norm in
front.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from surgery.errors import shown
from surgery.formats.foreign import Foreign, Translation, option
from surgery.formats.loralib import PARTS, groups
from surgery.formats.peft_config import is_positive
from surgery.plugin import Edit, Site, Sites, method

Identity = tuple[str, str, str]
_FUNCTIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu", "tanh": "tanh"}
_PLAIN: dict[str, Any] = {  # options of a bottleneck, with the values that have a place here
    "phm_layer": False,
    "inv_adapter": None,
    "use_gating": False,
    "original_ln_before": False,
    "ln_before": False,
    "ln_after": False,
    "original_ln_after": True,
    "cross_adapter": False,
}
_PARAMETERS = {"adapter_down.0": "down", "adapter_up": "up"}


def adapter_hub(adapter: Foreign, model: nn.Module, sites: Sites) -> Translation:
    """Return what an adapter of the adapters library becomes here.

    Raises:
        StoreError: its architecture or an option of it has no place here.
    """
    config = option(adapter, "config", {}, dict)
    inner = Foreign(adapter.where, config, adapter.tensors)
    architecture = config.get("architecture")
    if architecture == "lora":
        return _lora(inner, sites, option(adapter, "version", "", str))
    if architecture is None and "reduction_factor" in config:
        return _bottleneck(inner, sites)
    raise adapter.refuse(
        f"its architecture is {shown(architecture)}. Of the adapters library, LoRA and bottleneck "
        "adapters have a place here; its prefixes are arranged anew for each class of models."
    )


def _lora(adapter: Foreign, sites: Sites, version: str) -> Translation:
    config = {"composition_mode": "add", "use_gating": False, **adapter.config}
    if config["composition_mode"] != "add" or config["use_gating"]:
        raise adapter.refuse(f"its config is {shown(config)}; a gate or a product has no place.")
    rank, alpha = option(adapter, "r", 8, int), option(adapter, "alpha", 8, int, float)
    if not is_positive(alpha) or not is_positive(rank):
        raise adapter.refuse(f"its config has r={shown(rank)}, alpha={shown(alpha)}.")
    if version.startswith(("adapters.0.", "adapters.1.0.")):  # which scaled by 1, whatever alpha
        alpha = rank
    modules: dict[str, dict[str, str]] = {}
    for key, tensor in adapter.tensors.items():
        path, part = _split(adapter, key, ".loras.")
        if part not in PARTS:
            raise adapter.refuse(f"the tensor {shown(key)} is no A or B of a LoRA.")
        if part == "lora_B" and tensor.dim() == 2 and tensor.shape[1] != rank:
            raise adapter.refuse(f"{key} has the shape {tuple(tensor.shape)}, and r is {rank}.")
        modules.setdefault(path, {})[part] = key
    dropout = float(option(adapter, "dropout", 0.0, int, float))
    matrices = option(adapter, "attn_matrices", ["q", "v"], list)
    enabled = [name in matrices for name in "qkv"]
    return groups(adapter, sites, modules, float(alpha), enabled, dropout)


def _split(adapter: Foreign, key: str, mark: str) -> tuple[str, str]:
    """Return the module and the parameter of a key ``X.mark.NAME.parameter``."""
    path, found, rest = key.partition(mark)
    name, _, parameter = rest.partition(".")
    if not found or not name or not parameter:
        raise adapter.refuse(f"the tensor {shown(key)} is not named X{mark}NAME.parameter.")
    return path, parameter


def _bottleneck(adapter: Foreign, sites: Sites) -> Translation:
    beside = bool(adapter.config.get("is_parallel"))
    function, scale = _function(adapter, beside)
    chosen, values = _parts(adapter, sites)
    kinds = {site.kind for site in chosen.values()}
    if beside and (kinds != {"ffn"} or any(site.norm for site in chosen.values())):
        raise adapter.refuse(
            "its bottlenecks run beside sub-layers and read what comes before their norm; here "
            "they read what the sub-layer reads."
        )
    ranks = {len(x["down.weight"]) for x in values.values() if "down.weight" in x}
    if len(ranks) != 1 or 0 in ranks:
        raise adapter.refuse(f"its bottlenecks have the widths {shown(ranks)}; one has a place.")
    after = "houlsby" if len(kinds) == 2 else "pfeiffer" if kinds == {"ffn"} else "attention"
    made = method(
        "ffn_adapter",
        rank=ranks.pop(),
        placement="parallel" if beside else after,
        scale=scale,
        activation=function,
        dropout=float(option(adapter, "dropout", 0.0, int, float)),
    )

    def value(path: str, edit: Edit, parameter: str) -> Tensor | None:
        return values.get((path, edit.site, edit.kind), {}).get(parameter)

    return Translation([made], Sites([s for s in sites if s.identity in chosen]), value)


def _function(adapter: Foreign, beside: bool) -> tuple[str, float]:
    """Return the function and the scale of plain bottlenecks.

    Raises:
        StoreError: an option has a value that has no place here.
    """
    config = {**_PLAIN, **adapter.config}
    wrong = [name for name, value in _PLAIN.items() if config[name] != value]
    wrong = [name for name in wrong if name != "original_ln_before" or not beside]
    if wrong:
        raise adapter.refuse(
            f"its bottlenecks have {wrong[0]}={shown(config[wrong[0]])}. Those that read what a "
            "sub-layer gives, before residual and norm, have a place here."
        )
    function = _FUNCTIONS.get(str(config.get("non_linearity")).lower())
    scale = option(adapter, "scaling", 1.0, int, float)
    if function is None or not is_positive(scale):
        raise adapter.refuse(
            f"its bottlenecks have non_linearity={shown(config.get('non_linearity'))} and "
            f"scaling={shown(scale)}; {', '.join(_FUNCTIONS)} and numbers > 0 have a place here."
        )
    return function, float(scale)


def _parts(
    adapter: Foreign, sites: Sites
) -> tuple[dict[Identity, Site], dict[Identity, dict[str, Tensor]]]:
    """Return the sites of bottlenecks, and the values of their parameters.

    Raises:
        StoreError: a tensor belongs to something else, or to no site of this model.
    """
    chosen: dict[Identity, Site] = {}
    values: dict[Identity, dict[str, Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        path, parameter = _split(adapter, key, ".adapters.")
        layer, _, last = parameter.rpartition(".")
        if layer not in _PARAMETERS or tensor.dim() == 0:
            raise adapter.refuse(f"the tensor {shown(key)} is no part of a plain bottleneck.")
        site = _site(adapter, path, sites)
        chosen[site.identity] = site
        values.setdefault(site.identity, {})[f"{_PARAMETERS[layer]}.{last}"] = tensor
    return chosen, values


def _site(adapter: Foreign, path: str, sites: Sites) -> Site:
    """Return the site at whose output a bottleneck stands.

    Raises:
        StoreError: there is none, or more than one.
    """
    block, _, last = path.rpartition(".")
    kind = {"attention_adapters": "attention", "output_adapters": "ffn"}.get(last)
    found = []
    for site in sites:
        output = site.ports["output"].module if "output" in site.ports else ""
        own = output.rpartition(".")[0] == path
        if (own and kind is None) or (
            site.kind == kind and f"{site.path}.".startswith(f"{block}.")
        ):
            found.append(site)
    if len(found) != 1:
        raise adapter.refuse(f"{len(found)} sites of this model have their output at {path}.")
    return found[0]
