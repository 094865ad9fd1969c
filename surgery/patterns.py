"""The two patterns: attention and feed-forward (FFN), found by dataflow in a captured graph.

    attention   Q K^T -> ... -> softmax -> ... -> (softmax) V, or one call that does it all
    FFN         projection -> nonlinearity (-> times another projection) -> projection

Read on the flat graph of a model they say where the sites are; read on the graph of a host they
name its ports. A pattern's ``key`` is the same in both, so a site is found again in any variant.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from surgery.attention_pattern import attention_pattern
from surgery.dataflow import is_activation, projection
from surgery.ffn_pattern import experts_pattern, ffn_pattern, joins_residual
from surgery.pattern import Pattern, PortNode

__all__ = ["Pattern", "PortNode", "find_patterns", "joins_residual"]


def find_patterns(graph: fx.Graph, root: nn.Module) -> list[Pattern]:
    """Every attention and FFN of a graph, in the order of the computation."""
    attention = [p for node in graph.nodes if (p := attention_pattern(node, root)) is not None]
    taken = {p.projection.node for a in attention for p in a.ports.values() if p.projection}
    ffn = [
        p
        for node in graph.nodes
        if (found := projection(node, root)) and node not in taken
        if (p := ffn_pattern(found, root)) is not None
    ]
    ffn += [
        p
        for node in graph.nodes
        if is_activation(node) and not projection(node, root)
        if (p := experts_pattern(node, root)) is not None
    ]
    order = {node: i for i, node in enumerate(graph.nodes)}
    patterns = sorted(attention + ffn, key=lambda p: order[p.core])
    count: dict[tuple[Any, ...], int] = {}
    for p in patterns:  # several of one kind in one call of one module are told apart by number
        place = (p.kind, p.key, p.core.meta.get("call", 0))
        count[place] = count.get(place, -1) + 1
        if count[place]:
            p.key += f"#{count[place]}"
    return patterns
