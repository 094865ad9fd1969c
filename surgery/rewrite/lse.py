"""Make the attention in a graph return the logsumexp of its scores, too.

    softmax in the graph     a node ``logsumexp(scores)`` beside the softmax
    SDPA call                replaced by ``attention``, which returns (context, lse)
    library's function       replaced by ``with_lse(function)``, likewise

The context stays the same bit for bit. The lse is (B, H, n), in at least float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgery.attention import attention, logsumexp, with_lse
from surgery.patterns import Match, inputs, is_row_maximum, op_name, split_rows, value
from surgery.rewrite.nodes import column_functions, reorder, rows_like, tokens_like
from surgery.rewrite.replays import replayed_heads, replayed_lse, tokens_in_a_row


def expose_lse(match: Match) -> fx.Node:
    """Add the logsumexp of an attention's scores to its graph, and return its node (B, H, n).

    An attention that is computed in chunks of its queries gets the chunks' lse, concatenated.
    """
    if match.replay is not None:
        return replayed_lse(_expose_one(match), match)
    if not match.parts:
        return _with_heads(_expose_one(match), match)
    rows = [_with_heads(_expose_one(part), part) for part in match.parts]
    graph = rows[0].graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    with graph.inserting_after(max(rows, key=lambda n: order[n])):
        return graph.call_function(torch.cat, (rows, -1))


def split_heads(heads: fx.Node, match: Match) -> fx.Node:
    """Return query heads as (B, H, n, d)."""
    if match.replay is not None:
        return replayed_heads(heads, match)
    if match.order is not None:
        with heads.graph.inserting_after(heads):
            return heads.graph.call_function(reorder, (heads, match.order))
    if heads.meta["value"].dim() != 3 or not match.heads:
        return heads
    with heads.graph.inserting_after(heads):
        return heads.graph.call_function(split_rows, (heads, match.heads))


def key_heads(name: str, match: Match) -> fx.Node:
    """Return the heads of port ``name``, keys or values, as (B, G, m, d)."""
    node = match.ports[name].node
    if name in match.head_orders:
        with node.graph.inserting_after(node):
            node = node.graph.call_function(reorder, (node, match.head_orders[name]))
    if value(match.ports[name].node).dim() != 3 or not match.kv_heads:
        return node
    with node.graph.inserting_after(node):
        return node.graph.call_function(split_rows, (node, match.kv_heads))


def merged_tokens(match: Match) -> fx.Node:
    """Return the merged heads as (B, n, H d)."""
    port = match.ports["merged"]
    if match.replay is not None:
        graph, rows = port.node.graph, port.node
        with graph.inserting_after(rows):
            rows = graph.call_function(tokens_in_a_row, (rows,))
        if port.columns is None:
            return rows
        with graph.inserting_after(rows):
            take = column_functions(port.columns, value(port.node).device).take
            return graph.call_function(take, (rows,))
    heads = split_heads(match.ports["query_heads"].node, match)
    graph = heads.graph
    with graph.inserting_after(max(heads, port.node)):
        return graph.call_function(tokens_like, (port.node, heads, port.sequence_first))


def _with_heads(lse: fx.Node, match: Match) -> fx.Node:
    """Return ``lse`` as (B, H, n)."""
    if match.order is not None:
        return lse
    heads = match.ports["query_heads"].node
    graph = lse.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    rows = lse
    if not _has_rows_of(heads, lse):
        with graph.inserting_after(max(lse, heads, key=lambda n: order[n])):
            rows = graph.call_function(rows_like, (lse, heads))
    if heads.meta["value"].dim() != 3 or not match.heads:
        return rows
    with graph.inserting_after(rows):
        return graph.call_function(_split_lse, (rows, match.heads))


def _has_rows_of(heads: fx.Node, lse: fx.Node) -> bool:
    """Whether ``heads`` are the query of the very call that gave ``lse``, so their rows agree."""
    call = lse.args[0]
    return lse.target is lse_of and isinstance(call, fx.Node) and heads in call.args[:2]


def _split_lse(lse: Tensor, n_heads: int) -> Tensor:
    return lse.reshape(-1, n_heads, lse.shape[-1])  # (B H, n) -> (B, H, n)


def _expose_one(match: Match) -> fx.Node:
    """Add the logsumexp of one attention call's scores to the graph, and return its node."""
    if not match.exposed:
        match.exposed.append(_exposed(match))
    return match.exposed[0]


def _exposed(match: Match) -> fx.Node:
    """Let an attention call return its lse as well, and return the node of it."""
    core = match.core
    graph = core.graph
    scores = match.softmax_input
    if scores is not None:
        if op_name(scores) == "sub" and is_row_maximum(scores.args[1]):
            # A maximum subtracted for stability is no part of the scores.
            scores = inputs(scores)[0]
        with graph.inserting_after(scores):
            return graph.call_function(logsumexp, (scores,))
    with graph.inserting_after(core):
        of_library = core.meta.get("attention")
        both = (
            graph.call_function(with_lse(core.target), core.args, dict(core.kwargs))  # type: ignore[arg-type]
            if of_library
            else graph.call_function(attention, core.args, dict(core.kwargs))
        )
    with graph.inserting_after(both):
        lse = graph.call_function(lse_of, (both,))
        first = graph.call_function(output_of, (both,))
    first.meta.update(core.meta)
    core.replace_all_uses_with(first)
    for port in match.ports.values():
        if port.node is core:
            port.node = first
    graph.erase_node(core)
    match.core = first
    return lse


def output_of(pair: tuple[Any, Any]) -> Any:
    """Return what the attention function itself returned."""
    return pair[0]


def lse_of(pair: tuple[Any, Any]) -> Any:
    """Return the logsumexp beside it."""
    return pair[1]
