"""Give ports of convolutions the axes that methods know: (B, D, h, w) becomes (B, h w, D).

    conv -> y (B, D, h, w) -> readers          as the model has it
    conv -> y -> tokens (B, h w, D) -> back (B, D, h, w) -> readers

Edits of the port stand between ``tokens`` and ``back``. Without an edit both are views.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from surgery.patterns import Match, every_position, value


def tokens_of(y: Tensor) -> Tensor:
    """Return y (B, D, h, w), or (B, D, n), as (B, h w, D)."""
    return y.flatten(2).transpose(1, 2)


def read_tokens(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return the positions of x that a convolution with these strides reads, as (B, n, D)."""
    return tokens_of(every_position(x, strides))


def as_channels(tokens: Tensor, like: Tensor) -> Tensor:
    """Return tokens (B, h w, D) in the shape of ``like`` (B, D, h, w), and in its memory format.

    A convolution may choose another kernel, which rounds in another way, for other strides.
    """
    back = tokens.transpose(1, 2).reshape(like.shape)
    if back.stride() == like.stride():
        return back
    same = torch.empty_strided(like.shape, like.stride(), dtype=back.dtype, device=back.device)
    return same.copy_(back)


def features_to_the_end(match: Match) -> None:
    """Let the ports of a match whose features are axis 1 name nodes (B, h w, D) instead."""
    nodes = dict.fromkeys(p.node for p in match.ports.values() if p.channels_first)
    for node in nodes:
        tokens = _insert(node)
        for port in match.ports.values():
            if port.node is node and port.channels_first:
                port.node, port.channels_first = tokens, False


def _insert(node: fx.Node) -> fx.Node:
    """Insert the two views behind a node, and return the first."""
    graph = node.graph
    readers = list(node.users)
    with graph.inserting_after(node):
        tokens = graph.call_function(tokens_of, (node,))
    tokens.meta.update(value=tokens_of(value(node)), owner=node.meta.get("owner"))
    with graph.inserting_after(tokens):
        back = graph.call_function(as_channels, (tokens, node))
    back.meta.update(value=value(node), owner=node.meta.get("owner"))
    for reader in readers:
        reader.replace_input_with(node, back)
    return tokens
