"""Give ports the axes that methods know, (B, n, D), where the model has others.

    conv -> y (B, D, h, w) -> readers          as the model has it
    conv -> y -> tokens (B, h w, D) -> back (B, D, h, w) -> readers

A context (B, H, n, d) that is the port ``merged`` becomes (B, n, H d) likewise, and so does what an
einsum with a weight (D, H, d) gives, (B, n, H, d). Edits of the port stand between ``tokens`` and
``back``. Without an edit both are views.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from surgery.patterns import Match, PortNode, every_position, value


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


def merge_heads(context: Tensor) -> Tensor:
    """Return a context (B, H, n, d) as (B, n, H d)."""
    return context.transpose(1, 2).flatten(2)


def as_heads(tokens: Tensor, like: Tensor) -> Tensor:
    """Return tokens (B, n, H d) in the shape of ``like`` (B, H, n, d)."""
    return tokens.reshape(like.transpose(1, 2).shape).transpose(1, 2)


def flat_features(y: Tensor, axes: int) -> Tensor:
    """Return y (B, n, H, d), whose features are the last ``axes`` axes, as (B, n, H d)."""
    return y.flatten(-axes)


def shaped_as(tokens: Tensor, like: Tensor) -> Tensor:
    """Return tokens (B, n, H d) in the shape of ``like`` (B, n, H, d)."""
    return tokens.reshape(like.shape)


def in_tokens(port: PortNode) -> Tensor:
    """Return the example value of a port as its edits see it, (B, n, D)."""
    y: Tensor = value(port.node)
    if not _has_other_axes(port):
        return y
    to, more, _ = _views(port)
    return to(y, *more)


def feature_axes(port: PortNode) -> int:
    """Return how many last axes of a port's node are features: an einsum may make (H, d)."""
    projection = port.projection
    return projection.axes if projection and port.node is projection.node else 1


def _has_other_axes(port: PortNode) -> bool:
    """Whether the node of a port is not (B, n, D)."""
    return port.channels_first or port.heads_first or feature_axes(port) > 1


def _views(
    port: PortNode,
) -> tuple[Callable[..., Tensor], tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]:
    """Return the function to (B, n, D), its arguments behind the port's value, and the way back."""
    if feature_axes(port) > 1:
        return flat_features, (feature_axes(port),), shaped_as
    return (tokens_of, (), as_channels) if port.channels_first else (merge_heads, (), as_heads)


def features_to_the_end(match: Match) -> None:
    """Let the ports of a match that have other axes name nodes (B, n, D)."""
    done: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for port in match.ports.values():
        if _has_other_axes(port):
            if port.node not in done:
                done[port.node] = _insert(port.node, *_views(port))
            port.node = done[port.node][0]
            port.channels_first = port.heads_first = False
    for name in ("query_heads", "key_heads", "value_heads", "query_unrotated"):
        heads = match.ports.get(name)
        if heads is not None and heads.node in done:  # what an einsum makes is already split
            heads.node = done[heads.node][1]


def _insert(
    node: fx.Node,
    to: Callable[..., Tensor],
    more: tuple[int, ...],
    back: Callable[[Tensor, Tensor], Tensor],
) -> tuple[fx.Node, fx.Node]:
    """Insert ``to(node, *more)`` and ``back`` behind a node, and return both."""
    graph = node.graph
    readers = list(node.users)
    with graph.inserting_after(node):
        tokens = graph.call_function(to, (node, *more))
    tokens.meta.update(value=to(value(node), *more), owner=node.meta.get("owner"))
    with graph.inserting_after(tokens):
        returned = graph.call_function(back, (tokens, node))
    returned.meta.update(value=value(node), owner=node.meta.get("owner"))
    for reader in readers:
        reader.replace_input_with(node, returned)
    return tokens, returned
