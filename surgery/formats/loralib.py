"""Translate LoRA as loralib and the adapters library save it: A and B, and no word on groups.

    X.lora_A (r, in), X.lora_B (out, r)               a layer of one group
    X.lora_A (k r, in), X.lora_B (k out / n, r)       k of the n equal groups of a fused projection

loralib writes A and B beside whatever else was trained, and no scale. adapters writes them as
X.loras.NAME.lora_A, and the scale into its config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from surgery.errors import shown
from surgery.formats.foreign import Foreign, Translation
from surgery.formats.modules import Place, Ports, at_ports, out_width, places
from surgery.formats.peft_config import is_positive
from surgery.formats.peft_lora import ranks_and_alphas
from surgery.plugin import Sites

PARTS = ("lora_A", "lora_B")


def groups(
    adapter: Foreign, sites: Sites, modules: Mapping[str, Mapping[str, str]], alpha: float,
    enabled: Sequence[bool], dropout: float = 0.0,
) -> Translation:  # fmt: skip
    """Return what LoRA of layers with groups becomes here: an update of each group's port.

    Args:
        modules: the names of A and B by module.
        alpha: numerator of the scale.
        enabled: which groups of a fused projection are updated.

    Raises:
        StoreError: a module is not there, or A and B do not fit it.
    """
    values: dict[Place, dict[str, Tensor]] = {}
    own: dict[str, tuple[int, float]] = {}
    for path, ports in places(adapter, modules, sites).items():
        missing = [part for part in PARTS if part not in modules[path]]
        if missing:
            raise adapter.refuse(f"it lacks {missing[0]} of {path}.")
        a, b = (adapter.tensors[modules[path][part]] for part in PARTS)
        parts = _of_ports(adapter, path, ports, a, b, enabled)
        own[path] = (b.shape[1], alpha)
        values |= parts
    options = ranks_and_alphas(adapter, own) | {"dropout": dropout, "fused": _share(values)}
    return at_ports("lora", options, sites, values)


def _share(values: Mapping[Place, Mapping[str, Tensor]]) -> bool:
    """Whether ports of one projection share A."""
    return len({id(each["a"]) for each in values.values()}) < len(values)


def _of_ports(
    adapter: Foreign, path: str, ports: Ports, a: Tensor, b: Tensor, enabled: Sequence[bool]
) -> dict[Place, dict[str, Tensor]]:
    """Return A and B of each updated port of a module."""
    width, out = ports[0][1].in_width, out_width(ports)
    shapes = f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} of {path}"
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != width or not b.shape[1]:
        raise adapter.refuse(f"{shapes} do not map {width} to {out} features.")
    rank = b.shape[1]
    if a.shape[0] == rank and b.shape[0] == out:  # one group
        return {
            (*site.identity, port.name): {
                "a": a, "b": b.T if port.columns is None else b.T[:, list(port.columns)]
            }
            for site, port in ports
        }  # fmt: skip
    size, chosen = out // max(len(enabled), 1), [i for i, on in enumerate(enabled) if on]
    if (a.shape[0], b.shape[0]) != (len(chosen) * rank, len(chosen) * size):
        raise adapter.refuse(
            f"{shapes} are no updates of the groups {shown(list(enabled))} of {out} features. Say "
            "with enabled= which are updated."
        )
    found: dict[Place, dict[str, Tensor]] = {}
    for number, group in enumerate(chosen):
        columns = tuple(range(group * size, (group + 1) * size))
        inside = [(site, port) for site, port in ports if port.columns == columns]
        if not inside:
            raise adapter.refuse(f"group {group + 1} of {path} makes no port of its own here.")
        site, port = inside[0]
        rows, outs = (
            slice(number * rank, (number + 1) * rank),
            slice(number * size, (number + 1) * size),
        )
        found[(*site.identity, port.name)] = {"a": a[rows], "b": b[outs].T}
    return found


def from_layers(
    adapter: Foreign, sites: Sites, alpha: float, enabled: Sequence[bool]
) -> Translation:
    """Return what the state dict of a model with loralib's layers becomes here.

    Raises:
        StoreError: a module is not there, A and B do not fit it, or the scale is no number > 0.
    """
    if not is_positive(alpha):
        raise adapter.refuse(f"alpha is {shown(alpha)}.")
    modules: dict[str, dict[str, str]] = {}
    kept = {}
    for key, tensor in adapter.tensors.items():
        path, _, last = key.rpartition(".")
        if last in PARTS:
            modules.setdefault(path, {})[last] = key
        else:
            kept[key] = tensor
    return dataclasses.replace(groups(adapter, sites, modules, alpha, enabled), kept=kept)
