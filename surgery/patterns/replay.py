"""Bring what is computed for each query into the order of the output's tokens.

The rows of the query heads need not be the output's tokens in order: a model may cut tokens into
windows, blocks or units, or concatenate several streams and take one of them out afterwards. But
the model itself rearranges the context, which has the same rows:

    context (..., heads, ..., d) -> reshape, transpose, slice, ... -> merged (B, n, H d)

A :class:`Replay` is that chain of nodes. Copied onto another tensor in the context's shape, such as
the query heads or the logsumexp, it puts those into the output's order as well, in a call of any
size. The chain is accepted if labels show that each token's features arrive head by head.
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
        axis: the axis of the heads in the context, the query heads, and the keys.
        channels_first: the merged heads are (B, H d, h, w).
    """

    nodes: tuple[fx.Node, ...]
    heads: int
    axis: int
    channels_first: bool


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
    width = example.shape[-1]
    features = torch.arange(width, dtype=torch.int32)
    for axis in range(1, example.dim() - 1):
        count = example.shape[axis]
        if count * width != end.shape[-1]:
            continue
        numbers = torch.arange(count, dtype=torch.int32) * width
        numbers = numbers.reshape([-1 if i == axis else 1 for i in range(example.dim())])
        found = propagate_labels(context, (numbers + features).expand(example.shape), merged)
        if found is not None and _counts_up(features_last(found, first)):
            return Replay(tuple(chain), count, axis, first)
    return None


def _counts_up(labels: Tensor) -> bool:
    """Whether the last axis of ``labels`` is 0, 1, 2, ... for every token."""
    return bool((labels == torch.arange(labels.shape[-1], dtype=labels.dtype)).all())
