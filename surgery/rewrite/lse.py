"""Lse: make the attention in a graph also give the logsumexp of its scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgery.attention import attention, logsumexp, with_lse
from surgery.patterns import Pattern, inputs, is_row_maximum, op_name, split_rows, value
from surgery.rewrite.nodes import reorder, rows_like, tokens_like


def expose_lse(pattern: Pattern) -> fx.Node:
    """A node with the logsumexp (B, H, n) of a pattern's scores; the context keeps its bits."""
    if not pattern.parts:
        return _shaped(_of_one(pattern), pattern)
    rows = [_shaped(_of_one(part), part) for part in pattern.parts]
    graph = rows[0].graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    with graph.inserting_after(max(rows, key=lambda n: order[n])):
        return graph.call_function(torch.cat, (rows, -1))


def split_heads(heads: fx.Node, pattern: Pattern) -> fx.Node:
    """Heads as (B, H, n, d)."""
    if pattern.order is not None:
        with heads.graph.inserting_after(heads):
            return heads.graph.call_function(reorder, (heads, pattern.order))
    if heads.meta["value"].dim() != 3 or not pattern.heads:
        return heads
    with heads.graph.inserting_after(heads):
        return heads.graph.call_function(split_rows, (heads, pattern.heads))


def key_heads(name: str, pattern: Pattern) -> fx.Node:
    """Heads of keys or values as (B, G, m, d)."""
    node = pattern.ports[name].node
    if name in pattern.orders:
        with node.graph.inserting_after(node):
            node = node.graph.call_function(reorder, (node, pattern.orders[name]))
    if value(pattern.ports[name].node).dim() != 3 or not pattern.kv_heads:
        return node
    with node.graph.inserting_after(node):
        return node.graph.call_function(split_rows, (node, pattern.kv_heads))


def merged_tokens(pattern: Pattern) -> fx.Node:
    """The merged heads as (B, n, H d)."""
    port = pattern.ports["merged"]
    heads = split_heads(pattern.ports["query_heads"].node, pattern)
    graph = heads.graph
    with graph.inserting_after(max(heads, port.node)):
        return graph.call_function(tokens_like, (port.node, heads, port.sequence_first))


def _shaped(lse: fx.Node, pattern: Pattern) -> fx.Node:
    """lse as (B, H, n)."""
    if pattern.order is not None:
        return lse
    heads = pattern.ports["query_heads"].node
    graph = lse.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    rows = lse
    if not _made_for(heads, lse):
        with graph.inserting_after(max(lse, heads, key=lambda n: order[n])):
            rows = graph.call_function(rows_like, (lse, heads))
    if heads.meta["value"].dim() != 3 or not pattern.heads:
        return rows
    with graph.inserting_after(rows):
        return graph.call_function(_split_lse, (rows, pattern.heads))


def _made_for(heads: fx.Node, lse: fx.Node) -> bool:
    """Were these very heads the query of the call that gave ``lse``? It has their rows then."""
    called = lse.args[0]
    return lse.target is second_of and isinstance(called, fx.Node) and heads in called.args[:2]


def _split_lse(lse: Tensor, n_heads: int) -> Tensor:
    return lse.reshape(-1, n_heads, lse.shape[-1])


def _of_one(pattern: Pattern) -> fx.Node:
    """Make the attention of a pattern also give its logsumexp; the context keeps its bits."""
    core = pattern.core
    graph = core.graph
    scores = pattern.softmax_input
    if scores is not None:
        if op_name(scores) == "sub" and is_row_maximum(scores.args[1]):  # subtracted for stability
            scores = inputs(scores)[0]
        with graph.inserting_after(scores):
            return graph.call_function(logsumexp, (scores,))
    with graph.inserting_after(core):
        whole = core.meta.get("attention")
        both = (
            graph.call_function(with_lse(core.target), core.args, dict(core.kwargs))  # type: ignore[arg-type]
            if whole
            else graph.call_function(attention, core.args, dict(core.kwargs))
        )
    with graph.inserting_after(both):
        lse = graph.call_function(second_of, (both,))
        first = graph.call_function(first_of, (both,))
    first.meta.update(core.meta)
    core.replace_all_uses_with(first)
    for port in pattern.ports.values():
        if port.node is core:
            port.node = first
    graph.erase_node(core)
    pattern.core = first
    return lse


def first_of(pair: tuple[Any, Any]) -> Any:
    """What an attention function itself returned."""
    return pair[0]


def second_of(pair: tuple[Any, Any]) -> Any:
    """Its logsumexp."""
    return pair[1]
