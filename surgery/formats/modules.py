"""Find the ports that modules make, and splice updates of whole modules port by port."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from surgery.formats.foreign import Foreign, Translation
from surgery.plugin import Edit, Port, Site, Sites, method

Ports = list[tuple[Site, Port]]
Place = tuple[str, str, str, str]  # path, key and kind of a site, and a port


def projections(sites: Sites) -> dict[str, Ports]:
    """Return for each module that makes projections the sites and ports that it makes.

    A weight's name is a key, too: a stack of experts' weights has no module of its own.
    """
    found: dict[str, Ports] = {}
    for site in updatable(sites):
        for port in site.ports.values():
            for key in {port.module, port.weight} - {""} if port.in_width is not None else ():
                found.setdefault(key, []).append((site, port))
    return found


def updatable(sites: Sites) -> list[Site]:
    """Return the sites of every kind that has projections."""
    others = (sites.linear, sites.embedding, sites.convolution, sites.experts)
    return [*sites, *(site for kind in others for site in kind)]


def places(
    adapter: Foreign, modules: Mapping[str, Mapping[str, str]], sites: Sites
) -> dict[str, Ports]:
    """Return the ports that each module of an adapter makes.

    Raises:
        StoreError: a module makes no port, or makes ports that lack some of its features, or it is
            a table of positions.
    """
    if not modules:
        raise adapter.refuse("it updates no module.")
    known = projections(sites)
    tables = {site.path for site in sites.position}
    if table := next((path for path in modules if path in tables), None):
        raise adapter.refuse(
            f"it updates {table}, a table of positions, and no method here does. Merge it into its "
            "base with PEFT's merge_and_unload, or train it without that module."
        )
    missing = [path for path in modules if path not in known]
    if missing:
        first = min(modules[missing[0]].values())
        raise adapter.refuse(
            f"{len(missing)} of its {len(modules)} modules are no projections that a site of "
            f"this model reaches, as {missing[0]} ({first} {tuple(adapter.tensors[first].shape)}). "
            "Load it into the base that it was made for; print(surgery.locate(model)) shows what "
            "this one has."
        )
    for path in modules:
        ports = known[path]
        columns = [c for _, port in ports for c in port.columns or ()]
        whole = len(ports) == 1 and ports[0][1].columns is None
        if not whole and sorted(columns) != list(range(out_width(ports))):
            names = ", ".join(f"{port.name} of {site.path}" for site, port in ports)
            raise adapter.refuse(f"{path} makes {names}, and they are not its features, each once.")
    return {path: known[path] for path in modules}


def out_width(ports: Ports) -> int:
    """Return how many features a module makes, all of its ports together."""
    return sum(port.width for _, port in ports)


def at_ports(
    name: str,
    options: Mapping[str, Any],
    sites: Sites,
    values: Mapping[Place, Mapping[str, Tensor]],
) -> Translation:
    """Return the translation to a method at just these ports, with these values of parameters."""
    picks: dict[tuple[str, str, str], list[str]] = {}
    for path, key, kind, port in values:
        picks.setdefault((path, key, kind), []).append(port)
    chosen = [
        dataclasses.replace(site, picked=tuple(p for p in site.ports if p in picks[site.identity]))
        for site in updatable(sites)
        if site.identity in picks
    ]

    def value(path: str, edit: Edit, parameter: str) -> Tensor | None:
        return values.get((path, edit.site, edit.kind, edit.port), {}).get(parameter)

    return Translation([method(name, **options)], Sites(chosen), value)
