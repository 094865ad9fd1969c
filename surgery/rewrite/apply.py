"""Apply: one edit of a method, carried out on the patterns of one graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from surgery.errors import PortError
from surgery.patterns import Match, PortNode, bias_of, caller_of, reads_now, value
from surgery.plugin import CountsVirtualKeys, Edit, adds_onto
from surgery.rewrite.lse import expose_lse, key_heads, merged_tokens, split_heads
from surgery.rewrite.nodes import (
    add,
    add_sequence_first,
    added,
    chain,
    column_functions,
    put,
    put_sequence_first,
    rewrite,
)


def apply_edit(matches: Iterable[Match], edit: Edit, child: str, root: nn.Module) -> bool:
    """Apply one edit to a graph, wherever its site occurs.

    Returns:
        False if the port is not computed in this graph (keys that come from a cache).
    """
    done = False
    for match in matches:
        if match.holds(edit.kind, edit.site) and edit.port in match.ports:
            act = _feed if edit.verb == "feed" else _edit
            act(match, edit, child, root)
            done = True
    return done


def _edit(match: Match, edit: Edit, child: str, root: nn.Module) -> None:
    port = match.ports[edit.port]
    before = set(port.node.graph.nodes)
    reads = tuple(_read(match, name, root) for name in edit.reads)
    own = None if port.columns is None else column_functions(port.columns, device_of(port))

    def make(graph: fx.Graph) -> fx.Node:
        y: Any = port.node
        turned = port.sequence_first and edit.batched
        if edit.verb == "add" and own is None and not turned and _adds(child, reads, y, root):
            module = graph.get_attr(child)
            with graph.inserting_after(module):
                return graph.call_function(added, (module, y, *reads))
        if edit.verb == "add":
            plain = add_sequence_first if turned else add
            return chain(graph, (child, reads), (own.add if own else plain, (y, ...)))
        if own is None and edit.batched:
            return chain(graph, (child, reads), (put_sequence_first if turned else put, (y, ...)))
        if own is None:
            return chain(graph, (child, reads or (y,)))
        if reads:
            return chain(graph, (child, reads), (own.put, (y, ...)))
        return chain(graph, (own.take, (y,)), (child, (...,)), (own.put, (y, ...)))

    nodes = [node for node in reads if node is not None]
    new = rewrite(port.node, nodes, make, set(port.node.graph.nodes) - before)
    new.meta.update(value=port.node.meta.get("value"), owner=port.node.meta.get("owner"))
    if edit.port == "merged" and isinstance(root.get_submodule(child), CountsVirtualKeys):
        match.totals.append((child, tuple(nodes)))
    old = port.node
    for other in match.ports.values():
        if other.node is old:
            other.node = new
        if other.projection is not None and other.projection.source is old:
            other.projection = dataclasses.replace(other.projection, source=new)


def _adds(child: str, reads: tuple[fx.Node | None, ...], y: fx.Node, root: nn.Module) -> bool:
    """Does a module add its output to the port itself (``onto``), token by token?"""
    if not reads or not adds_onto(root.get_submodule(child)):
        return False
    x, out = (None if node is None else node.meta.get("value") for node in (reads[0], y))
    return x is not None and out is not None and x.shape[:-1] == out.shape[:-1]


def port_values(matches: Iterable[Match], edit: Edit) -> list[tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of the port that an edit is for, wherever its site occurs."""
    found = [p.ports[edit.port] for p in matches if p.holds(edit.kind, edit.site)
             and edit.port in p.ports]  # fmt: skip
    held: list[torch.Tensor] = [value(port.node) for port in found]
    return [
        (torch.Size((*v.shape[:-1], len(port.columns))) if port.columns else v.shape, v.dtype)
        for v, port in zip(held, found, strict=True)
    ]


def device_of(port: PortNode) -> torch.device:
    """Where a port's values are in the call that is captured; one elsewhere has its own graph."""
    held: torch.Tensor = value(port.node)
    return held.device


def _feed(match: Match, edit: Edit, child: str, root: nn.Module) -> None:
    """``P(x)`` becomes ``P(child(x))``; in a fused projection only for the port's own columns."""
    port = match.ports[edit.port]
    made = port.projection
    assert made is not None  # Port.feed has asked
    graph = made.node.graph
    if port.own is None and port.features is not None:
        _split_off(match, port)
    port.own = port.own or caller_of(made.node)
    source = reads_now(port.own)
    with graph.inserting_before(port.own):
        fed = graph.call_module(child, (source,))
    fed.meta.update(value=source.meta.get("value"), owner=source.meta.get("owner"))
    port.own.replace_input_with(source, fed)


def _split_off(match: Match, port: PortNode) -> None:
    """Give a port inside a fused projection a call of that projection of its own."""
    assert port.projection is not None
    assert port.features is not None
    chosen = column_functions(port.features, device_of(port))
    raw = port.projection.node
    graph = raw.graph
    copies: dict[fx.Node, fx.Node] = {}
    last = raw
    for node in dict.fromkeys((caller_of(raw), raw)):
        with graph.inserting_after(last):
            copies[node] = last = graph.node_copy(node, lambda n: copies.get(n, n))
    with graph.inserting_after(last):
        own = graph.call_function(chosen.take, (last,))
    with graph.inserting_after(own):
        new = graph.call_function(chosen.put, (raw, own))
    new.meta.update(raw.meta)
    kept = {new, *copies.values()}
    raw.replace_all_uses_with(new, delete_user_cb=lambda user: user not in kept)
    for other in match.ports.values():
        if other.node is raw:
            other.node = new
    port.own = copies[caller_of(raw)]


def _bias(port: PortNode, root: nn.Module) -> fx.Node | None:
    """The bias that a port's projection adds, or None."""
    found = None if port.projection is None else bias_of(port.projection, root)
    if found is None:
        return None
    graph = port.node.graph
    with graph.inserting_before(port.node):
        node = graph.get_attr(found) if isinstance(found, str) else found
        if port.features is None:
            return node
        return graph.call_function(column_functions(port.features, device_of(port)).take, (node,))


def _read(match: Match, name: str, root: nn.Module) -> fx.Node | None:
    if name.endswith(".bias"):
        return _bias(match.ports[name.removesuffix(".bias")], root)
    if name == "lse" and "lse" not in match.ports:
        match.ports["lse"] = PortNode(expose_lse(match))
    if name == "lse":
        _count_virtual(match)
    if name in ("query_unrotated", "query_heads"):
        return split_heads(match.ports[name].node, match)
    if name in ("key_heads", "value_heads"):
        return key_heads(name, match)
    if name == "merged":
        return merged_tokens(match)
    port = match.ports[name.removesuffix(".source")]
    if not name.endswith(".source") and port.columns is not None:
        with port.node.graph.inserting_after(port.node):
            take = column_functions(port.columns, device_of(port)).take
            return port.node.graph.call_function(take, (port.node,))
    if name.endswith(".source") and port.projection is not None:
        return _flat(port.projection.source, port.projection.in_axes)
    return port.node


def _count_virtual(match: Match) -> None:
    """Let the lse that is read from now on count what earlier edits have put among the keys."""
    while match.totals:
        child, reads = match.totals.pop(0)
        graph = reads[0].graph
        order = {node: i for i, node in enumerate(graph.nodes)}
        host = next(iter(order))  # the first placeholder
        with graph.inserting_after(max(reads, key=lambda n: order[n])):
            total = chain(graph, (getattr, (host, child)), (total_lse, (..., *reads)))
        match.ports["lse"] = PortNode(total)


def total_lse(module: Any, *reads: torch.Tensor) -> torch.Tensor:
    """What a module that replaced the merged heads makes of their logsumexp."""
    total: torch.Tensor = module.total_lse(*reads)
    return total


def _flat(node: fx.Node, axes: int) -> fx.Node:
    """Features on one axis."""
    if axes == 1:
        return node
    with node.graph.inserting_after(node):
        return node.graph.call_method("flatten", (node, -axes))


def require_applied(done: bool, edit: Edit, path: str) -> None:
    """Raise if an edit found no place in the graph that it was made for."""
    if not done:
        raise PortError(
            f"{edit.child!r} at {path}: port {edit.port!r} of site {edit.site!r} is not computed "
            "in this forward, so nothing was inserted. Choose another port."
        )
