"""Apply one edit of a method to the matches of one graph.

    Edit(site, port, verb, child, reads)      the matches of a host's graph
         |
         v
    _read      one node for each name in ``reads``: the value of a port, a projection's source or
               bias, heads as (B, H, n, d), merged heads as (B, n, H d), the lse
         |
         v
    _edit      insert, add, replace: new nodes after the port's node; whoever read that node reads
               the last new one
    feed       feed: a call of the child between a projection and what it reads
         |
         v
    the ports of the match name the new nodes

``child`` is the name of the inserted module on the host, which is the ``root`` of the graph. The
edits of a host are data and are applied to each of its graphs, in the order of the splice, so every
edit sees the ports as the edits before it left them. Matches live until the graph is compiled. The
verb ``wrap`` edits no graph: the host runs the child around its forward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from surgery.errors import PortError
from surgery.patterns import (
    Match,
    PortNode,
    Projection,
    bias_of,
    value,
)
from surgery.plugin import CountsVirtualKeys, Edit, adds_onto
from surgery.rewrite.call_facts import ASKS, read_fact
from surgery.rewrite.casts import as_module_takes, cast, needed_cast
from surgery.rewrite.channels import features_to_the_end, in_tokens, read_tokens
from surgery.rewrite.feed import feed
from surgery.rewrite.lse import expose_lse, key_heads, merged_tokens, split_heads
from surgery.rewrite.mixing import let_weights_mix, open_scores
from surgery.rewrite.nodes import (
    add,
    add_sequence_first,
    added,
    added_grouped,
    calling,
    chain,
    column_functions,
    device_of,
    insert_after,
    put,
    put_sequence_first,
)
from surgery.rewrite.partly import Partly
from surgery.rewrite.shared_products import added_to_columns


def apply_edit(
    matches: Iterable[Match], edit: Edit, child: str, root: nn.Module, partly: Partly | None = None
) -> bool:
    """Apply one edit to every match of its site.

    Args:
        child: the name of the inserted module on ``root``, the host.
        partly: how the edit counts, if it counts in part.

    Returns:
        False if this graph does not compute the port, such as keys that come from a cache.
    """
    done = False
    for match in matches:
        if match.is_site(edit.kind, edit.site) and edit.port in match.ports:
            act = feed if edit.verb == "feed" else _edit
            act(match, edit, child, root, partly)
            done = True
    return done


def _edit(match: Match, edit: Edit, child: str, root: nn.Module, partly: Partly | None) -> None:
    """Insert, add or replace at a port, and let the match's ports name the new node."""
    features_to_the_end(match)
    if "scores" in (edit.port, *edit.reads):
        open_scores(match)
    if edit.port == "weights":
        let_weights_mix(match)
    port = match.ports[edit.port]
    before = set(port.node.graph.nodes)
    module = root.get_submodule(child)
    given = [_read(match, name, port, root) for name in edit.reads]
    alone = partly is None or partly.children is None  # a group casts for each of its modules
    reads = as_module_takes(given, edit.reads, port.node, module) if alone else tuple(given)
    dtype = needed_cast(port.node, module) if alone else None
    fused = None if port.columns is None else column_functions(port.columns, device_of(port))

    def build(
        y: fx.Node, reads: tuple[fx.Node | None, ...], callee: fx.Node | None = None
    ) -> fx.Node:
        """Build the nodes of the new value; a port with columns changes only these."""
        graph, call = y.graph, functools.partial(calling, child, callee)
        sequence_first = port.sequence_first and edit.batched
        plainly = edit.verb == "add" and fused is None and not sequence_first
        if plainly and _takes_onto(child, reads, y, root):
            if callee is not None:
                return graph.call_function(added_grouped, (callee, y, *reads))
            adding = graph.get_attr(child)
            with graph.inserting_after(adding):
                return graph.call_function(added, (adding, y, *reads))
        columns = fused.slice if fused and edit.verb == "add" and not sequence_first else None
        alone = callee is None and len(reads) == 1
        if columns and alone and _takes_onto(child, reads, y, root):
            adding = graph.get_attr(child)
            with graph.inserting_after(adding):
                update = (*columns, adding, reads[0], None, 0)
                return graph.call_function(added_to_columns, (y, update))
        if edit.verb == "add":
            plain = add_sequence_first if sequence_first else add
            return chain(graph, call(reads), (fused.add if fused else plain, (y, ...)))
        if fused is None and edit.batched:
            back = put_sequence_first if sequence_first else put
            return chain(graph, call(reads), (back, (y, ...)))
        if fused is None and dtype is None:
            return chain(graph, call(reads or (y,)))
        if fused is None:
            first = [] if reads else [(cast, (y, dtype))]
            return chain(graph, *first, call(reads or (...,)), (put, (y, ...)))
        if reads:
            return chain(graph, call(reads), (fused.put, (y, ...)))
        cut: list[Any] = [(fused.take, (y,))]
        cut += [] if dtype is None else [(cast, (..., dtype))]
        return chain(graph, *cut, call((...,)), (fused.put, (y, ...)))

    def make(graph: fx.Graph) -> fx.Node:
        if partly is None:
            return build(port.node, reads)
        return partly.around(build, port.node, reads, _batched(reads, edit.reads))

    nodes = [node for node in reads if node is not None]
    new = insert_after(port.node, nodes, make, set(port.node.graph.nodes) - before)
    new.meta.update(value=port.node.meta.get("value"), owner=port.node.meta.get("owner"))
    if edit.port == "merged" and isinstance(module, CountsVirtualKeys):
        match.uncounted_virtual.append((child, tuple(nodes), partly))
    old = port.node
    if match.softmax_input is old:
        match.softmax_input = new
    for other in match.ports.values():
        if other.node is old:
            other.node = new
        if other.projection is not None and other.projection.source is old:
            other.projection = dataclasses.replace(other.projection, source=new)


def _batched(reads: Iterable[fx.Node | None], names: Iterable[str]) -> tuple[bool, ...]:
    """Return which of the nodes that a module reads have the batch as their first axis."""
    return tuple(
        not name.endswith(".bias")
        and name != "cached"
        and (name != "mask" or getattr(value(node), "ndim", 0) > 3)
        for node, name in zip(reads, names, strict=True)
    )


def _takes_onto(child: str, reads: tuple[fx.Node | None, ...], y: fx.Node, root: nn.Module) -> bool:
    """Whether a module takes the port's value as ``onto`` and returns the sum itself.

    What it reads first and the port must have the same tokens: the axes before the last, or those
    of heads (B, H, n, d) without the heads.
    """
    if not reads or not adds_onto(root.get_submodule(child)):
        return False
    x, out = (None if node is None else node.meta.get("value") for node in (reads[0], y))
    if x is None or out is None:
        return False
    heads = x.ndim == 4 and out.ndim == 3 and x.shape[::2] == out.shape[:-1]
    return bool(heads or x.shape[:-1] == out.shape[:-1])


def port_values(matches: Iterable[Match], edit: Edit) -> list[tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of an edit's port in every match of its site."""
    ports = [m.ports[edit.port] for m in matches if m.is_site(edit.kind, edit.site)
             and edit.port in m.ports]  # fmt: skip
    values = [in_tokens(p) for p in ports]
    return [
        (torch.Size((*v.shape[:-1], len(port.columns))) if port.columns else v.shape, v.dtype)
        for v, port in zip(values, ports, strict=True)
    ]


def _bias(port: PortNode, root: nn.Module) -> fx.Node | None:
    """Return a node with the bias that a port's projection adds, its own columns only, or None."""
    found = None if port.projection is None else bias_of(port.projection, root)
    if found is None:
        return None
    graph = port.node.graph
    with graph.inserting_before(port.node):
        node = graph.get_attr(found) if isinstance(found, str) else found
        if port.features is None:
            return node
        return graph.call_function(column_functions(port.features, device_of(port)).take, (node,))


def _read(match: Match, name: str, port: PortNode, root: nn.Module) -> fx.Node | None:
    """Return the node for one name of ``reads``, in the shape that the legend of sites gives.

    None stands for a bias or a mask that there is not.
    """
    if name == "mask" and "mask" not in match.ports:
        return None
    if name in ASKS and name not in match.ports:
        return read_fact(match, port, name)
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
        return _source(port.projection)
    return port.node


def _count_virtual(match: Match) -> None:
    """Make the lse port count the virtual keys that earlier edits have added to the attention.

    Each such edit left its child and its reads in ``match.uncounted_virtual``; the child's
    ``total_lse`` computes the lse of all keys so far.
    """
    while match.uncounted_virtual:
        child, reads, partly = match.uncounted_virtual.pop(0)
        match.ports["lse"] = PortNode(_counted(match.ports["lse"].node, child, reads, partly))


def _counted(lse: fx.Node, child: str, reads: Any, partly: Partly | None) -> fx.Node:
    """Return the lse with the virtual keys of one child."""
    graph = lse.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    host = next(iter(order))  # the first placeholder is the host itself

    def build(_: fx.Node, given: tuple[fx.Node | None, ...], __: Any = None) -> fx.Node:
        return chain(graph, (getattr, (host, child)), (total_lse, (..., *given)))

    with graph.inserting_after(max((lse, *reads), key=lambda n: order[n])):
        return build(lse, reads) if partly is None else partly.count(build, lse, reads)


def total_lse(module: Any, *reads: torch.Tensor) -> torch.Tensor:
    """Call ``module.total_lse``: the logsumexp of all keys, those of the module included."""
    total: torch.Tensor = module.total_lse(*reads)
    return total


def _source(projection: Projection) -> fx.Node:
    """Return what a projection reads, with its features as one last axis."""
    node = projection.source
    if projection.in_axes == 1 and not projection.channels_first:
        return node
    with node.graph.inserting_after(node):
        if projection.channels_first:
            tokens = node.graph.call_function(read_tokens, (node, projection.strides))
            example = read_tokens(value(node), projection.strides)
            tokens.meta.update(value=example, owner=node.meta.get("owner"))
            return tokens
        return node.graph.call_method("flatten", (node, -projection.in_axes))


def require_applied(done: bool, edit: Edit, path: str) -> None:
    """Raise PortError if an edit found no match in the graph of the splice's example call."""
    if not done:
        raise PortError(
            f"{edit.child!r} at {path}: port {edit.port!r} of site {edit.site!r} is not computed "
            "in this forward, so nothing was inserted. Choose another port."
        )
