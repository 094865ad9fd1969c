"""The two patterns: attention and feed-forward (FFN), found by dataflow in a captured graph.

    attention   Q K^T -> ... -> softmax -> ... -> (softmax) V, or one call that does it all
    FFN         projection -> nonlinearity (-> times another projection) -> projection

Read on the flat graph of a model they say where the sites are; read on the graph of a host they
name its ports. A pattern's ``key`` is the same in both, so a site is found again in any variant.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, fx, nn

from surgery.interop import is_whole, real_tensors
from surgery.patterns.attention import attention_pattern
from surgery.patterns.attention_ports import set_rows
from surgery.patterns.dataflow import is_activation, op_name, value
from surgery.patterns.ffn import experts_pattern, ffn_pattern
from surgery.patterns.match import Match, PortNode
from surgery.patterns.projection import projection
from surgery.patterns.scores import before_rotation


def find_matches(graph: fx.Graph, root: nn.Module) -> list[Match]:
    """Every attention and FFN of a graph, in the order of the computation."""
    with real_tensors():
        return _numbered(_attentions_and_ffns(graph, root), graph)


def _attentions_and_ffns(graph: fx.Graph, root: nn.Module) -> list[Match]:
    attention = _joined(
        [p for node in graph.nodes if (p := attention_pattern(node, root)) is not None]
    )
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
    if attention or ffn or not _is_projection(graph):
        return attention + ffn
    return linear_matches(graph, root, [])


def linear_matches(graph: fx.Graph, root: nn.Module, others: list[Match]) -> list[Match]:
    """The projections that belong to none of the other patterns."""
    taken = {p.projection.node for other in others for p in other.ports.values() if p.projection}
    inside = {node for other in others for node in other.nodes}
    found = [made for node in graph.nodes if (made := projection(node, root))]
    return [
        Match(
            "linear",
            made.module,
            made.node,
            {"input": PortNode(made.source), "output": PortNode(made.node, made)},
        )
        for made in found
        if made.node not in taken and made.node not in inside
    ]


def _is_projection(graph: fx.Graph) -> bool:
    """Is this the graph of one projection, and nothing else?"""
    return not any(node.op == "call_module" for node in graph.nodes)


def _numbered(found: list[Match], graph: fx.Graph) -> list[Match]:
    order = {node: i for i, node in enumerate(graph.nodes)}
    matches = sorted(found, key=lambda p: order[p.core])
    count: dict[tuple[Any, ...], int] = {}
    for p in matches:  # several of one kind in one call of one module are told apart by number
        place = (p.kind, p.key, p.core.meta.get("call", 0))
        count[place] = count.get(place, -1) + 1
        if count[place]:
            p.key += f"#{count[place]}"
    return matches


def _joined(matches: list[Match]) -> list[Match]:
    """Attention calls on chunks of one sequence, whose outputs are concatenated, as one pattern."""
    groups: dict[fx.Node, list[Match]] = {}
    for p in matches:
        groups.setdefault(p.ports["output"].node, []).append(p)
    joined: list[Match] = []
    for parts in groups.values():
        if len(parts) > 1 and _same_scores(parts):
            joined.append(_one_score(parts))
            continue
        whole = {n: _whole(parts, n) for n in ("query_heads", "key_heads", "value_heads")}
        if len(parts) == 1 or None in whole.values():
            joined += parts
            continue
        first = parts[0]
        ports = dict(first.ports)
        ports |= {name: PortNode(node) for name, node in whole.items() if node is not None}
        query = ports["query_heads"].node
        made = ports["query"].projection if "query" in ports else None
        ports["query_unrotated"] = PortNode(before_rotation(made.node, query) if made else query)
        nodes = [node for part in parts for node in part.nodes]
        found = dataclasses.replace(first, ports=ports, nodes=nodes, parts=parts, missing={})
        set_rows(found)
        joined.append(found)
    return joined


def _same_scores(parts: list[Match]) -> bool:
    """Are these calls with the same queries and keys, each on a part of the values?"""
    first = parts[0].ports
    names = ("query_heads", "key_heads")
    return all(p.ports[n].node is first[n].node for p in parts for n in names)


def _one_score(parts: list[Match]) -> Match:
    ports = dict(parts[0].ports)
    value = ports.get("value")
    if value is not None and value.projection is not None:
        made = [p.ports["value"] for p in parts if "value" in p.ports]
        chosen = {column for port in made for column in port.columns or ()}
        whole = len(chosen) == value.projection.width
        columns = None if whole or not chosen else sorted(chosen)
        ports["value"] = PortNode(value.projection.node, value.projection, columns, columns)
    nodes = [node for part in parts for node in part.nodes]
    return dataclasses.replace(parts[0], ports=ports, nodes=nodes)


def _whole(parts: list[Match], name: str) -> fx.Node | None:
    """What the chunks of all parts were split from, if it is one tensor, in their order."""
    chunks = [part.ports[name].node for part in parts]
    splits: list[Any] = [c.args[0] for c in chunks if op_name(c) == "getitem"]
    ordered = [c.args[1] for c in chunks if op_name(c) == "getitem"] == list(range(len(chunks)))
    if not ordered or any(split is not splits[0] for split in splits):
        return None
    if op_name(splits[0]) not in ("split", "chunk", "split_with_sizes"):
        return None
    whole: fx.Node = splits[0].all_input_nodes[0]
    return whole


def module_match(graph: fx.Graph) -> list[Match]:
    """The ports of a host that is such a module."""
    nodes = list(graph.nodes)
    given = [n for n in nodes if n.op == "placeholder" and isinstance(value(n), Tensor)]
    floats = [n for n in given if value(n).is_floating_point() and value(n).dim()]
    whole = [n for n in given if is_whole(value(n))]
    ports: dict[str, PortNode] = {}
    if whole:
        ports["positions"] = ports["ids"] = PortNode(whole[0])
    elif floats:
        ports["input"] = PortNode(floats[0])
    made: Any = nodes[-1].args[0]
    if isinstance(made, fx.Node) and isinstance(value(made), Tensor):
        ports["output"] = PortNode(made)
    return [Match("module", "", nodes[-1], ports, nodes)] if ports else []
