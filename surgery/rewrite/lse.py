"""Lse: make the attention in a graph also give the logsumexp of its scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgery.attention import attention, logsumexp, with_lse
from surgery.patterns import Match, inputs, is_row_maximum, op_name, split_rows, value
from surgery.rewrite.nodes import reorder, rows_like, tokens_like


def expose_lse(match: Match) -> fx.Node:
    """A node with the logsumexp (B, H, n) of a pattern's scores; the context keeps its bits."""
    if not match.parts:
        return _shaped(_of_one(match), match)
    rows = [_shaped(_of_one(part), part) for part in match.parts]
    graph = rows[0].graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    with graph.inserting_after(max(rows, key=lambda n: order[n])):
        return graph.call_function(torch.cat, (rows, -1))


def split_heads(heads: fx.Node, match: Match) -> fx.Node:
    """Heads as (B, H, n, d)."""
    if match.order is not None:
        with heads.graph.inserting_after(heads):
            return heads.graph.call_function(reorder, (heads, match.order))
    if heads.meta["value"].dim() != 3 or not match.heads:
        return heads
    with heads.graph.inserting_after(heads):
        return heads.graph.call_function(split_rows, (heads, match.heads))


def key_heads(name: str, match: Match) -> fx.Node:
    """Heads of keys or values as (B, G, m, d)."""
    node = match.ports[name].node
    if name in match.orders:
        with node.graph.inserting_after(node):
            node = node.graph.call_function(reorder, (node, match.orders[name]))
    if value(match.ports[name].node).dim() != 3 or not match.kv_heads:
        return node
    with node.graph.inserting_after(node):
        return node.graph.call_function(split_rows, (node, match.kv_heads))


def merged_tokens(match: Match) -> fx.Node:
    """The merged heads as (B, n, H d)."""
    port = match.ports["merged"]
    heads = split_heads(match.ports["query_heads"].node, match)
    graph = heads.graph
    with graph.inserting_after(max(heads, port.node)):
        return graph.call_function(tokens_like, (port.node, heads, port.sequence_first))


def _shaped(lse: fx.Node, match: Match) -> fx.Node:
    """lse as (B, H, n)."""
    if match.order is not None:
        return lse
    heads = match.ports["query_heads"].node
    graph = lse.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    rows = lse
    if not _made_for(heads, lse):
        with graph.inserting_after(max(lse, heads, key=lambda n: order[n])):
            rows = graph.call_function(rows_like, (lse, heads))
    if heads.meta["value"].dim() != 3 or not match.heads:
        return rows
    with graph.inserting_after(rows):
        return graph.call_function(_split_lse, (rows, match.heads))


def _made_for(heads: fx.Node, lse: fx.Node) -> bool:
    """Were these very heads the query of the call that gave ``lse``? It has their rows then."""
    called = lse.args[0]
    return lse.target is second_of and isinstance(called, fx.Node) and heads in called.args[:2]


def _split_lse(lse: Tensor, n_heads: int) -> Tensor:
    return lse.reshape(-1, n_heads, lse.shape[-1])


def _of_one(match: Match) -> fx.Node:
    """Make the attention of a pattern also give its logsumexp; the context keeps its bits."""
    core = match.core
    graph = core.graph
    scores = match.softmax_input
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
    for port in match.ports.values():
        if port.node is core:
            port.node = first
    graph.erase_node(core)
    match.core = first
    return lse


def first_of(pair: tuple[Any, Any]) -> Any:
    """What an attention function itself returned."""
    return pair[0]


def second_of(pair: tuple[Any, Any]) -> Any:
    """Its logsumexp."""
    return pair[1]
