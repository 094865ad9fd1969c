"""Tell the weights that stand in several places.

tied      the table of an embedding under another name: a head may be tied to the embedding, and an
          encoder and a decoder may have a module each for one table
shared    a weight that two sites run: streams of one attention may have the same projections
"""

from __future__ import annotations

import dataclasses

from torch import nn

from surgery.plugin import Port, Site


def shares_noted(sites: list[Site]) -> list[Site]:
    """Return attention and FFN sites; a port whose weight another of them runs says so."""
    users: dict[str, list[tuple[int, Port]]] = {}
    for number, site in enumerate(sites):
        for port in site.ports.values():
            users.setdefault(port.weight, []).append((number, port))

    def marked(number: int, port: Port) -> Port:
        others = (other for n, other in users[port.weight] if n != number)
        shared = bool(port.weight) and any(_overlap(port, other) for other in others)
        return dataclasses.replace(port, shared=True) if shared else port

    return [
        dataclasses.replace(site, ports={n: marked(i, p) for n, p in site.ports.items()})
        for i, site in enumerate(sites)
    ]


def _overlap(a: Port, b: Port) -> bool:
    """Whether two ports have a column of their matrix in common."""
    return a.columns is None or b.columns is None or not {*a.columns}.isdisjoint(b.columns)


_PORTS = {"linear": "output", "embedding": "rows"}


def ties_noted(sites: list[Site], model: nn.Module) -> list[Site]:
    """Return linear and other sites; a port whose weight is tied names the first embedding's."""
    tables: dict[int, str] = {}
    for site in sites:
        if "rows" in site.ports:
            name = site.ports["rows"].weight
            tables.setdefault(id(model.get_parameter(name)), name)
    noted = []
    for site in sites:
        name = _PORTS.get(site.kind, "")
        port = site.ports.get(name)
        if port is not None and port.weight and tables:
            first = tables.get(id(model.get_parameter(port.weight)), port.weight)
            if first != port.weight:
                ports = {**site.ports, name: dataclasses.replace(port, tied=first)}
                site = dataclasses.replace(site, ports=ports)
        noted.append(site)
    return noted
