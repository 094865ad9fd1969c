"""Survey a model: its layers, the graphs of their hosts, and which layers are alike.

    locate(model) ──► hosts ──host_graphs──► Place     one host, its sites, its graphs
                        │                      │
                        └── by layer ────────► Layer   layers with the same graphs are told once

A number that is a layer's own, as in the call of a KV cache, makes no difference between layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from torch import nn

from surgery.drawing.host_graphs import HostGraphs, edits_of, host_graphs
from surgery.errors import CaptureError, SiteError, suggest
from surgery.host import is_host
from surgery.locator import locate
from surgery.plugin import CALLS, Edit, Site, Sites


@dataclass
class Place:
    """One host: a module whose forward holds one site or several.

    Attributes:
        graphs: how its forward reads; None if it could not be captured, or is edited around its
            call only.
        edits: what is spliced in, by the inserted child.
        problem: why there is no graph.
        same: the first place of the model that reads the same; itself if none does.
    """

    path: str
    sites: list[Site]
    graphs: HostGraphs | None = None
    edits: dict[str, Edit] = field(default_factory=dict)
    problem: str = ""
    same: Place | None = None

    @property
    def edited(self) -> bool:
        """Whether something is spliced in here."""
        return bool(self.edits)

    @property
    def wraps(self) -> list[str]:
        """The children that stand around its call."""
        return [child for child, edit in self.edits.items() if edit.verb == "wrap"]

    @property
    def first(self) -> Place:
        """The first place that reads the same."""
        return self.same or self


@dataclass
class Layer:
    """The places of one layer, and its sites that are listed without a graph.

    Attributes:
        path: the path up to the layer's number; empty for what is in no layer.
        alike: later layers that read the same.
    """

    path: str
    places: list[Place] = field(default_factory=list)
    others: list[Site] = field(default_factory=list)
    alike: list[Layer] = field(default_factory=list)


def survey(model: nn.Module, example_inputs: Any = None) -> list[Layer]:
    """Return the layers of a model, in the order of the computation; what is in none comes last."""
    sites = locate(model, example_inputs)
    layers: dict[str, Layer] = {}
    known: list[Place] = []
    for place in _places(model, sites):
        _look(model, place)
        place.same = next((p for p in known if _alike(p, place)), None)
        if place.same is None:
            known.append(place)
        path = layer_of(place.path)
        layers.setdefault(path, Layer(path)).places.append(place)
    shown = {id(site) for layer in layers.values() for p in layer.places for site in p.sites}
    for site in sites.others:
        if id(site) not in shown:
            path = layer_of(site.path)
            layers.setdefault(path, Layer(path)).others.append(site)
    ordered = sorted(layers.values(), key=lambda layer: not layer.path)  # stable
    return [*_folded(ordered)]


def every_place(layers: Iterable[Layer]) -> Iterator[Place]:
    """Yield the places of layers, those of alike ones behind each."""
    for layer in layers:
        yield from layer.places
        yield from every_place(layer.alike)


def place_of(layers: Iterable[Layer], path: str) -> Place:
    """Return the place of a path.

    Raises:
        SiteError: no site is there, or none with a graph.
    """
    known = {place.path: place for place in every_place(layers)}
    if path not in known:
        raise SiteError(
            f"no site with a graph at {path!r}. {suggest(path, known)}"
            f"Sites: {', '.join(sorted(known)[:8])}{', ...' if len(known) > 8 else ''}."
        )
    if known[path].graphs is None:
        raise SiteError(f"{path}: {known[path].problem or 'only its call is edited, no graph is'}.")
    return known[path]


def layer_of(path: str) -> str:
    """Return a path up to its first number; empty if it has none."""
    found = re.match(r"(?:.*?\.)??\d+(?=\.|$)", path)
    return found.group() if found else ""


def _places(model: nn.Module, sites: Sites) -> list[Place]:
    """Return the hosts of attention, FFN and whatever else is edited, in order."""
    hosts: dict[str, Place] = {}
    core = sites if len(sites) else sites.linear
    here = {site.identity for site in core}
    others = [site for site in sites.others if site.identity not in here]
    edited = [site for site in others if is_host(model.get_submodule(site.path))]
    for site in [*core, *edited]:
        hosts.setdefault(site.path, Place(site.path, [])).sites.append(site)
    return [*hosts.values()]


def _look(model: nn.Module, place: Place) -> None:
    """Capture the graphs of a place, or note why there are none."""
    place.edits = edits_of(model.get_submodule(place.path))
    block = any(e.kind == "block" and e.verb != "wrap" for e in place.edits.values())
    inside = [site for site in place.sites if site.kind not in CALLS]
    inside += [site for site in place.sites if site.kind == "block" and block]
    if not inside:
        return
    try:
        place.graphs = host_graphs(model, inside[0])
    except CaptureError as error:
        place.problem = str(error)


def _alike(a: Place, b: Place) -> bool:
    """Whether two places read the same, but for the numbers of their layers."""
    if [s.description for s in a.sites] != [s.description for s in b.sites]:
        return False
    if a.edits.keys() != b.edits.keys() or (a.graphs is None) != (b.graphs is None):
        return False
    if a.graphs is None or b.graphs is None:
        return a.problem == b.problem == ""
    pairs = [(a.graphs.before, b.graphs.before), (a.graphs.after, b.graphs.after)]
    own = [_number(layer_of(place.path)) for place in (a, b)]
    return all(_same_text(str(x), str(y), *own) for x, y in pairs)


def _number(path: str) -> str:
    return path.rpartition(".")[2]


def _same_text(a: str, b: str, own_a: str, own_b: str) -> bool:
    if a == b:
        return True
    words = (re.findall(r"\w+|[^\w\s]+", text) for text in (a, b))
    return all(x == y or (x, y) == (own_a, own_b) for x, y in zip_longest(*words))


def _folded(layers: list[Layer]) -> Iterator[Layer]:
    """Yield the layers, each that reads as an earlier one of the same list behind that one."""
    known: dict[Any, Layer] = {}
    for layer in layers:
        places = tuple((_below(layer.path, p.path), id(p.first)) for p in layer.places)
        others = tuple((_below(layer.path, s.path), s.kind) for s in layer.others)
        stack = re.sub(r"\d+$", "", layer.path)
        if layer.path and (stack, places, others) in known:
            known[stack, places, others].alike.append(layer)
            continue
        known[stack, places, others] = layer
        yield layer


def _below(layer: str, path: str) -> str:
    return path[len(layer) :]
