"""Bring what is computed for each query into the order of the output's tokens.

The rows of the query heads need not be the output's tokens in order: a model may cut tokens into
windows, blocks or units, or concatenate several streams and take one of them out afterwards. But
the model itself rearranges the context, which has the same rows:

    context (..., heads, ..., d) -> reshape, transpose, slice, ... -> merged (B, n, H d)

A :class:`Replay` is that chain of nodes. Copied onto another tensor in the context's shape, such as
the query heads or the logsumexp, it puts those into the output's order as well, in a call of any
size. The chain is accepted if labels show that all tokens get the features of all heads in one
order. If that is not head by head, as in (B, n, d H), the replay notes the order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from surgery.patterns.dataflow import VIEWS, flow, forwarded, op_name, value
from surgery.patterns.layout import propagate_labels
from surgery.patterns.projection import features_last


@dataclass(frozen=True)
class Replay:
    """The rearrangement of an attention's context into the input of its output projection.

    Attributes:
        nodes: the nodes behind the context, in order; the last one holds the merged heads.
        heads: H, the number of heads in the merged features.
        axis: the axis of the heads in the context, the query heads, and the keys; 0 if they are
            (B H, ..., d).
        channels_first: the merged heads are (B, H d, h, w).
        columns: the merged features in the order head by head; None if they are in that order.
    """

    nodes: tuple[fx.Node, ...]
    heads: int
    axis: int
    channels_first: bool
    columns: list[int] | None = None


def replay_of(context: fx.Node, query: fx.Node, merged: fx.Node, first: bool) -> Replay | None:
    """Return the replay of a chain, or None if ``merged`` is not a rearranged context.

    Args:
        context, query: the nodes of the mixed heads and of the query heads, of one shape.
        merged: the node that the output projection reads.
        first: the features of ``merged`` are axis 1.
    """
    chain = flow(context, merged)[1:]
    example, end = value(context), features_last(value(merged), first)
    plain = all(op_name(n) in VIEWS or forwarded(n) for n in chain)
    if not chain or not plain or example.shape != value(query).shape:
        return None
    width, features = example.shape[-1], end.shape[-1]
    heads, rest = divmod(features, width)
    for axis in (*range(1, example.dim() - 1), 0):
        count = example.shape[axis]
        if rest or (count % heads if axis == 0 else count != heads):
            continue
        labels = torch.arange(count, dtype=torch.int32) % heads * width
        labels = labels.reshape([-1 if i == axis else 1 for i in range(example.dim())])
        labels = labels + torch.arange(width, dtype=torch.int32)
        found = propagate_labels(context, labels.expand(example.shape), merged)
        order = None if found is None else _one_order(features_last(found, first))
        if order is not None:
            columns = None if order == sorted(order) else order
            return Replay(tuple(chain), heads, axis, first, columns)
    return None


def _one_order(labels: Tensor) -> list[int] | None:
    """Return where the last axis of ``labels`` has 0, 1, 2, ..., if that is so for all tokens."""
    token = labels.reshape(-1, labels.shape[-1])[0]
    order = token.argsort()
    whole = torch.equal(token[order], torch.arange(len(token), dtype=token.dtype))
    return order.tolist() if whole and bool((labels == token).all()) else None
