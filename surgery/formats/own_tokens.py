"""Give an adapter the rows of its base's embedding that it brings as its own.

    D = R - E[tokens]        R (k, D) the adapter's rows, E the base's table

PEFT's ``trainable_token_indices`` belong to one adapter and switch with it. They become method
``tokens``, which holds D: another adapter, and the base, keep theirs. The rows of a table that is
no embedding of tokens, as of positions, and those of a head that is not tied stay rows of the base.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.formats.foreign import Foreign, Translation
from surgery.interop import onloaded, whole
from surgery.plugin import Edit, Method, Site, Sites, method
from surgery.splicer import Inserted

OWN = "tokens"  # the method
Rows = dict[str, tuple[list[int], Tensor]]  # by the name of a table: the numbers, and their rows


def with_own_tokens(
    adapter: Foreign, found: Translation, model: nn.Module, sites: Sites
) -> Translation:
    """Return a translation in which the rows of embeddings are no rows of the base any more.

    Raises:
        StoreError: LoRA updates the same table, or the table holds no numbers.
    """
    values: dict[str, Tensor] = {}
    methods: list[Method] = []
    chosen: list[Site] = []
    left: Rows = {}
    for name, (numbers, rows) in found.rows.items():
        table = next((s for s in sites.embedding if _table_of(s, model) == name), None)
        if table is None:
            left[name] = numbers, rows
            continue
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        tokens = tuple(numbers[i] for i in order)
        made = method(OWN, tokens=tokens, modules=f"^{re.escape(table.path)}$")
        at = made.choose([*sites.linear, *sites.embedding])  # the order of load
        taken = {site.identity for site in [*found.sites, *found.sites.others]}
        if any(site.identity in taken for site in at):
            raise adapter.refuse(f"it has rows of {name} and updates its module, too.")
        delta = rows[order].to(_at_least_float32(rows)) - _rows_of(adapter, model, name, tokens)
        methods.append(made)
        chosen += at
        values |= {site.path: delta for site in at}
    if not methods:
        return found

    def value(path: str, edit: Edit, parameter: str) -> Tensor | None:
        if edit.child.startswith(f"{OWN}_"):
            return values[path] if parameter.endswith("rows") else None
        return found.value(path, edit, parameter)

    return dataclasses.replace(
        found,
        methods=[*found.methods, *methods],
        sites=Sites([*found.sites], others=[*found.sites.others, *chosen]),
        value=value,
        rows=left,
    )


def _table_of(site: Site, model: nn.Module) -> str:
    """Return the name in ``named_parameters`` of the table of an embedding."""
    weight = site.ports["rows"].weight
    return _name_of(model.get_parameter(weight), model) if weight else ""


def _name_of(parameter: nn.Parameter, model: nn.Module) -> str:
    return next(name for name, own in model.named_parameters() if own is parameter)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _rows_of(adapter: Foreign, model: nn.Module, name: str, tokens: tuple[int, ...]) -> Tensor:
    """Return rows of a table of the base, on the CPU, in float32 or float64."""
    with onloaded([model.get_submodule(name.rpartition(".")[0])]):
        table = model.get_parameter(name).detach()
        if table.is_meta:
            raise adapter.refuse(
                f"it has rows of {name}, which holds no numbers here, so what they change is "
                "unknown. Load the weights of the base first."
            )
        rows = whole(table)[list(tokens)].cpu()
    return rows.to(_at_least_float32(rows))


def rows_with_own(
    model: nn.Module,
    rows: Mapping[str, list[int]],
    inserted: Iterable[Inserted],
    gather: Callable[[Tensor], Tensor],
) -> Rows:
    """Return the rows that a splice has of the base's tables: trained there, or of its own.

    Args:
        rows: the numbers of the rows that were trained in the base, by the name of the table.
        inserted: what method ``tokens`` has inserted.
        gather: returns the values of a parameter, whole and on the CPU.
    """
    deltas: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for i in inserted:
        module: Any = model.get_submodule(i.path)
        tokens, own = module.deltas()
        name = _name_of(model.get_parameter(i.site.ports[i.edit.port].weight), model)
        deltas.setdefault(name, {})[id(own)] = tokens.cpu(), own  # embedding and head share one
    found: Rows = {}
    for name in dict.fromkeys([*rows, *deltas]):
        several = list(deltas.get(name, {}).values())
        numbers = sorted({*rows.get(name, ()), *(int(n) for ns, _ in several for n in ns)})
        values = gather(model.get_parameter(name))[numbers].clone()
        for tokens, own in several:
            delta = gather(own)
            values = values.to(torch.promote_types(values.dtype, delta.dtype))
            values.index_add_(
                0, torch.searchsorted(torch.tensor(numbers), tokens), delta.to(values)
            )
        found[name] = numbers, values
    return found
