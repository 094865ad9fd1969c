"""Find the hidden states that a block takes and gives in the graph of its forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from surgery.patterns.dataflow import value
from surgery.patterns.match import Match, PortNode


def match_block(graph: fx.Graph) -> list[Match]:
    """Return a block's ports ``input`` and ``output``; no match if it gives no hidden states first.

    The output is what the graph returns, or the first of several values. The input is the first
    argument of its shape.
    """
    last = next(reversed(graph.nodes))
    given: Any = last.args[0]
    if isinstance(given, dict):
        given = next(iter(given.values()), None)
    elif isinstance(given, (tuple, list)):
        given = given[0] if given else None
    if not _hidden(given):
        return []
    ports = {"output": PortNode(given)}
    places = [n for n in graph.nodes if n.op == "placeholder" and _hidden(n)]
    if places and value(places[0]).shape == value(given).shape:
        ports["input"] = PortNode(places[0])
    return [Match("block", "block", given, ports, [given, *given.all_input_nodes])]


def _hidden(node: Any) -> bool:
    held = value(node)
    return isinstance(held, Tensor) and held.is_floating_point() and held.dim() > 1
