"""Copy the rearrangement of an attention's context onto its query heads and its logsumexp.

    query heads (..., H, ..., d)  -> copies of the chain -> (B, n, H d) -> (B, H, n, d)
    lse (..., H, ...)  -> expanded to d equal features -> the same -> (B, H, n)

See ``patterns/replay.py`` for the chain. The copies stand behind the merged heads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from surgery.patterns import Match, value
from surgery.rewrite.channels import tokens_of
from surgery.rewrite.nodes import column_functions


def replayed_heads(heads: fx.Node, match: Match) -> fx.Node:
    """Return query heads in the order of the output's tokens, as (B, H, n, d)."""
    return _replayed(heads, match, split_features)


def replayed_lse(lse: fx.Node, match: Match) -> fx.Node:
    """Return the logsumexp in the order of the output's tokens, as (B, H, n)."""
    context = match.ports["context"].node
    graph = lse.graph
    with graph.inserting_after(max(lse, context)):
        wide = graph.call_function(expand_features, (lse, context))
    return _replayed(wide, match, first_features)


def _replayed(node: fx.Node, match: Match, finish: object) -> fx.Node:
    """Append copies of the chain to ``node``, and a call of ``finish`` with the result and H."""
    replay, context = match.replay, match.ports["context"].node
    assert replay is not None
    graph = node.graph
    copies: dict[fx.Node, fx.Node] = {context: node}
    last = max(node, *replay.nodes)
    for each in replay.nodes:
        with graph.inserting_after(last):
            copies[each] = last = graph.node_copy(each, lambda n: copies.get(n, n))
    steps: list[tuple[Any, tuple[Any, ...]]] = [(tokens_of, ())] if replay.channels_first else []
    if replay.columns is not None:
        steps.append((column_functions(replay.columns, value(context).device).take, ()))
    for function, more in (*steps, (finish, (replay.heads,))):
        with graph.inserting_after(last):
            last = graph.call_function(function, (last, *more))
    return last


def expand_features(lse: Tensor, context: Tensor) -> Tensor:
    """Return the lse in the shape of the context, each number once for every feature."""
    return lse.reshape(context.shape[:-1]).unsqueeze(-1).expand(context.shape)


def split_features(merged: Tensor, heads: int) -> Tensor:
    """Return merged heads (B, ..., H d) as (B, H, n, d)."""
    rows = tokens_in_a_row(merged)
    return rows.reshape(*rows.shape[:2], heads, -1).transpose(1, 2)


def first_features(merged: Tensor, heads: int) -> Tensor:
    """Return the first feature of each head of merged heads (B, ..., H d) as (B, H, n)."""
    return split_features(merged, heads)[..., 0]


def tokens_in_a_row(merged: Tensor) -> Tensor:
    """Return (B, ..., D) as (B, n, D)."""
    return merged if merged.dim() == 3 else merged.reshape(merged.shape[0], -1, merged.shape[-1])
