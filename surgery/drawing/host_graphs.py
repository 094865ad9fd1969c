"""Capture the graph of one host for reading, before and after what is spliced into it.

    capture_host ──copy── Variant(base)    ──► Listing   before
         │
      apply_all ───────── Variant(edited)  ──► Listing   after; None where nothing edits the graph

Both graphs come from one capture, so a node of the base has the same name in both. Neither is kept
by the host: what runs is captured, compiled and guarded as ever.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from surgery.capture import Captured
from surgery.drawing.listing import Listing, listed
from surgery.drawing.names import argument_names, port_names, replacements, variable_names
from surgery.host import Variant, apply_all, capture_host, state_of
from surgery.interop import evaluating, exclusively
from surgery.plugin import Edit, Site


@dataclass(frozen=True)
class HostGraphs:
    """The graphs of one host, as they are read.

    Attributes:
        before: the graph of the base.
        after: the graph with everything that is spliced in; None if nothing edits it, as what
            stands around the whole call does not.
    """

    before: Listing
    after: Listing | None


def host_graphs(model: nn.Module, site: Site) -> HostGraphs:
    """Capture the graphs of the host of a site, with the call that the site was located with.

    Raises:
        CaptureError: the forward cannot be captured; the message names the line.
    """
    with evaluating(model):
        return exclusively(lambda: _both(model.get_submodule(site.path), site))


def edits_of(module: nn.Module) -> dict[str, Edit]:
    """Return every edit of a host, by the child that it inserts."""
    state = state_of(module)
    on = () if state is None else state.operations.values()
    return {child: e for o in on for e, child in zip(o.edits, o.children, strict=True)}


def _both(module: nn.Module, site: Site) -> HostGraphs:
    """Capture once; list the base, then apply every edit and list the result."""
    plan, state = site.host, state_of(module)
    assert plan is not None
    through = plan.through if state is None else plan.through | state.through
    captured, matches = capture_host(module, plan.path, through, plan.args, plan.kwargs)
    named = [m for m in matches if m.kind != ("module" if site.kind == "block" else "block")]
    given = argument_names(module, captured.graph, plan.args, plan.kwargs)
    ports = port_names(named)
    base, copies = _copied(captured)
    old = set(captured.graph.nodes)
    edits = edits_of(module)
    inside = {child: e for child, e in edits.items() if e.verb != "wrap"}
    kinds, shapes = _values(captured.graph)
    if inside and state is not None:
        apply_all(module, state, captured, matches, state.all_on())
        more = {n: t for n, t in port_names(named).items() if n not in old}
    Variant(base)
    on_base = {copies[node]: found for node, found in ports.items() if node in copies}
    names = variable_names(base.graph, {copies[n]: t for n, t in given.items()}, on_base)
    arguments = {copies[n]: t for n, t in given.items()}
    known = {copies[n]: kinds[n] for n in copies}, {copies[n]: shapes[n] for n in copies}
    before = listed(base.graph, names, on_base, arguments, *known, {})
    if not inside:
        return HostGraphs(before, None)

    Variant(captured)
    here = [node for node in captured.graph.nodes if node in copies]
    taken = {node: names[copies[node]] for node in here if copies[node] in names}
    news = replacements(base.graph, captured.graph, copies)
    ports = {**ports, **more, **{new: ports[was] for new, was in news.items() if was in ports}}
    for new, was in news.items():
        kinds[new], shapes[new] = kinds[was], shapes[was]
    ports = {node: found for node, found in ports.items() if node.graph is captured.graph}
    names = variable_names(captured.graph, taken, ports, news)
    inserted = _inserted(captured.graph, old, inside)
    after = listed(captured.graph, names, ports, given, kinds, shapes, inserted)
    return HostGraphs(before, after)


def _copied(captured: Captured) -> tuple[Captured, dict[fx.Node, fx.Node]]:
    """Return a copy of a captured graph with its own nodes, and the copy of each node."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(captured.graph, copies))
    branches = [dataclasses.replace(b, node=copies[b.node]) for b in captured.branches]
    return dataclasses.replace(captured, graph=graph, branches=branches), copies


def _values(graph: fx.Graph) -> tuple[dict[fx.Node, str], dict[fx.Node, str]]:
    """Return what each node holds (see ``Writer``), and the shapes of tensors in the example."""
    kinds, shapes = dict[fx.Node, str](), dict[fx.Node, str]()
    for node in graph.nodes:
        held = node.meta.get("value")
        several = [x for x in held if isinstance(x, Tensor)] if isinstance(held, tuple) else []
        kinds[node] = "tensors" if several else _kind(held)
        each = [held] if isinstance(held, Tensor) else several
        shapes[node] = ", ".join(f"({', '.join(map(str, x.shape))})" for x in each)
    return kinds, shapes


def _kind(held: Any) -> str:
    if isinstance(held, Tensor):
        return "tensor"
    return "number" if isinstance(held, (bool, int, float)) else "other"


def _inserted(graph: fx.Graph, old: set[fx.Node], edits: dict[str, Edit]) -> dict[fx.Node, str]:
    """Return the nodes that splices have added, with what each is about."""
    children: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node in old or node.op == "output" or node.meta.get("keep"):
            continue  # the last is the check of a branch
        near = [n for n in node.all_input_nodes if n in children]
        called = [n for n in near if n.op == "get_attr"] or near
        own = [str(node.target)] if node.op in ("get_attr", "call_module") else []
        found = [name for name in own if name in edits]
        children[node] = tuple(dict.fromkeys(found + [c for n in called for c in children[n]]))
    return {node: _told(names, edits) for node, names in children.items()}


def _told(children: tuple[str, ...], edits: dict[str, Edit]) -> str:
    """Say which edits a node belongs to."""
    if len(children) == 1:
        return f"{children[0]}: {edits[children[0]].verb} at {edits[children[0]].port}"
    return ", ".join(children) or "spliced in"
