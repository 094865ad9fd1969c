"""Give an adapter the linear layers of its base that it brings whole, such as a head, as its own.

PEFT's ``modules_to_save`` belong to one adapter and switch with it. They become method ``full``,
which holds copies: another adapter, and the base, keep theirs. What is no linear layer outside
attention and FFN, and a weight that is tied to another, stays a tensor of the base.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from torch import Tensor, nn

from surgery.formats.foreign import Translation
from surgery.plugin import Edit, Port, Site, Sites, method
from surgery.splicer import Inserted

OWN = "full"  # the method


def with_own_heads(found: Translation, model: nn.Module, sites: Sites) -> Translation:
    """Return a translation in which whole linear layers are no tensors of the base any more."""
    own = dict(model.named_parameters())
    heads: dict[str, dict[str, Tensor]] = {}
    chosen: list[Site] = []
    for site in sites.linear:
        port = site.ports.get("output")
        if port is None or not port.weight or port.columns is not None:
            continue
        if all(name in found.kept and name in own for name in _names(port)):
            weight = found.kept[port.weight]
            heads[site.path] = {"weight": weight if port.transposed else weight.T}
            heads[site.path] |= {"bias": found.kept[port.bias]} if port.bias else {}
            chosen.append(site)
    if not chosen:
        return found
    taken = {name for site in chosen for name in _names(site.ports["output"])}

    def value(path: str, edit: Edit, parameter: str) -> Tensor | None:
        if edit.verb == "replace" and edit.kind == "linear":
            return heads[path].get(parameter)
        return found.value(path, edit, parameter)

    pattern = "|".join(f"^{re.escape(path)}$" for path in heads)
    return dataclasses.replace(
        found,
        methods=[*found.methods, method(OWN, modules=pattern)],
        sites=Sites([*found.sites], others=[*found.sites.others, *chosen]),
        value=value,
        kept={name: tensor for name, tensor in found.kept.items() if name not in taken},
    )


def _names(port: Port) -> list[str]:
    return [name for name in (port.weight, port.bias) if name]


def as_base_tensors(model: nn.Module, inserted: Iterable[Inserted]) -> dict[str, Tensor]:
    """Return what the layers of an adapter's own hold, by the names of the base's parameters."""
    found: dict[str, Tensor] = {}
    for i in inserted:
        port, own = i.site.ports[i.edit.port], model.get_submodule(i.path)
        weight, bias = own.weight, own.bias
        assert isinstance(weight, Tensor)
        found[port.weight] = weight if port.transposed else weight.T
        if port.bias:
            assert isinstance(bias, Tensor)
            found[port.bias] = bias
    return found
