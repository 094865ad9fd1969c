"""Find every attention and feed-forward network (FFN) of a graph by its dataflow.

    attention   Q K^T -> ... -> softmax -> ... -> (softmax) V, or one call for all of this
    FFN         projection -> nonlinearity (-> times another projection) -> projection

What flows in is an ``fx.Graph`` whose nodes carry an example value (``meta["value"]``) and the path
of the module that ran them (``meta["owner"]``). What comes out is a list of :class:`Match`, each
with the nodes of its ports. The graph is read, never changed:

    find_matches(graph, root)
        for each node
        +-- softmax, attention call -> attention.py        finds queries, keys, values and context
        |                              attention_ports.py  finds their projections
        |                              streams.py          tells the streams of tokens apart
        |                              attention_output.py finds merged heads and output
        |                              layout.py           says which columns and tokens they are
        |                              rows.py             matches rows with the output's tokens
        |                              replay.py           brings rows into the output's order
        |                              scores.py           says how queries and keys are scored
        +-- projection -------------> ffn.py               walks back to an earlier projection
        +-- experts ----------------> experts.py
        then join the parts of one attention, and number matches that share a key

dataflow.py has the walks over a graph, projection.py recognises a learned linear map, and match.py
defines the result.

Two graphs are read this way. The flat graph of a whole model says where its sites are (locator/).
The graph of one host names the ports of a site in one variant (host/). A match has the same ``key``
in both, so a site that is found once is found again in any variant. A match lives as long as the
graph that it points into; edits of that graph update its ports.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, fx, nn

from surgery.interop import is_integer_tensor, real_tensors
from surgery.patterns.attention import match_attention
from surgery.patterns.attention_output import input_of
from surgery.patterns.attention_ports import assemble
from surgery.patterns.dataflow import is_activation, is_parameter, op_name, value
from surgery.patterns.experts import match_experts
from surgery.patterns.ffn import match_ffn
from surgery.patterns.match import Match, PortNode
from surgery.patterns.projection import Projection, projection
from surgery.patterns.rows import set_rows
from surgery.patterns.scores import before_rotation
from surgery.plugin import FoundAttention, find_sites


def find_matches(graph: fx.Graph, root: nn.Module) -> list[Match]:
    """Return every attention and FFN of a graph, in the order of the computation.

    A graph with neither, and without calls of modules, is that of a single linear layer. It gives
    its projections instead, of kind ``linear``.

    Args:
        graph: a captured graph, or the flat graph of an observation.
        root: the module that the targets of the graph's nodes refer to.
    """
    with real_tensors():
        return _number_keys(_attentions_and_ffns(graph, root), graph)


def _attentions_and_ffns(graph: fx.Graph, root: nn.Module) -> list[Match]:
    """Return the matches of a graph, unnumbered; a projection of an attention ends no FFN."""
    known = [m for node in graph.nodes for m in match_attention(node, root)]
    cores = {match.core for match in known}
    new = [found for found in find_sites(graph, root) if found.core not in cores]
    attention = _join_parts(known + [m for found in new for m in _pointed_out(found, root)])
    taken = {p.projection.node for a in attention for p in a.ports.values() if p.projection}
    ffn = [
        match
        for node in graph.nodes
        if (down := projection(node, root)) and node not in taken
        if (match := match_ffn(down, root)) is not None
    ]
    ffn += [
        match
        for node in graph.nodes
        if is_activation(node) and not projection(node, root)
        if (match := match_experts(node, root)) is not None
    ]
    if attention or ffn or not _calls_no_module(graph):
        return attention + ffn
    return linear_matches(graph, root, [])


def _pointed_out(found: FoundAttention, root: nn.Module) -> list[Match]:
    """Return the attention that a plugin has pointed out."""
    heads = found.query, found.key, found.value
    matches = assemble(found.core, root, *heads, found.context, {}, found.scale)
    for each in matches:
        each.missing["lse"] = "a plugin has pointed it out (find_sites), which knows no logsumexp"
    return matches


def linear_matches(graph: fx.Graph, root: nn.Module, others: list[Match]) -> list[Match]:
    """Return the projections that are not part of any of the ``others``, of kind ``linear``."""
    taken = {p.projection.node for other in others for p in other.ports.values() if p.projection}
    inside = {node for other in others for node in other.nodes}
    found = projections(graph, root)
    return [
        Match(
            "linear",
            proj.module,
            proj.node,
            {
                "input": input_of(proj),
                "output": PortNode(proj.node, proj, channels_first=proj.channels_first),
            },
        )
        for proj in found
        if proj.node not in taken and proj.node not in inside
    ]


def projections(graph: fx.Graph, root: nn.Module) -> list[Projection]:
    """Return every projection of a graph, in order."""
    return [proj for node in graph.nodes if (proj := projection(node, root))]


def _calls_no_module(graph: fx.Graph) -> bool:
    """Whether no submodule is called in a graph, as in that of a single linear layer."""
    return not any(node.op == "call_module" for node in graph.nodes)


def _number_keys(found: list[Match], graph: fx.Graph) -> list[Match]:
    """Sort matches by their cores, and make their keys unique.

    Several matches of one kind in one call of a module get ``#1``, ``#2`` after the first. Matches
    in different calls of a module keep one key: they are one site.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    matches = sorted(found, key=lambda match: order[match.core])
    count: dict[tuple[Any, ...], int] = {}
    for match in matches:
        place = (match.kind, match.key, match.core.meta.get("call", 0))
        count[place] = count.get(place, -1) + 1
        if count[place]:
            match.key += f"#{count[place]}"
    return matches


def _join_parts(matches: list[Match]) -> list[Match]:
    """Join attention calls that make one output together.

    Calls on chunks of one sequence become one match with these calls as its ``parts``. Calls with
    the same queries and keys, each on a part of the values, become one match of the first core.
    """
    groups: dict[Any, list[Match]] = {}
    for match in matches:
        alone = id(match) if match.stream else match.ports["output"].node
        groups.setdefault(alone, []).append(match)
    joined: list[Match] = []
    for parts in groups.values():
        if len(parts) > 1 and _share_scores(parts):
            joined.append(_join_values(parts))
            continue
        whole = {
            n: _tensor_before_split(parts, n) for n in ("query_heads", "key_heads", "value_heads")
        }
        if len(parts) == 1 or None in whole.values():
            joined += parts
            continue
        first = parts[0]
        ports = dict(first.ports)
        ports |= {name: PortNode(node) for name, node in whole.items() if node is not None}
        query = ports["query_heads"].node
        proj = ports["query"].projection if "query" in ports else None
        ports["query_unrotated"] = PortNode(before_rotation(proj.node, query) if proj else query)
        nodes = [node for part in parts for node in part.nodes]
        found = dataclasses.replace(first, ports=ports, nodes=nodes, parts=parts, missing={})
        set_rows(found)
        joined.append(found)
    return joined


def _share_scores(parts: list[Match]) -> bool:
    """Whether calls have the same queries and keys, so that they differ in their values only."""
    first = parts[0].ports
    names = ("query_heads", "key_heads")
    return all(part.ports[n].node is first[n].node for part in parts for n in names)


def _join_values(parts: list[Match]) -> Match:
    """Join calls with the same scores: the value port gets the columns of all of them."""
    ports = dict(parts[0].ports)
    value = ports.get("value")
    if value is not None and value.projection is not None:
        each = [part.ports["value"] for part in parts if "value" in part.ports]
        chosen = {column for port in each for column in port.columns or ()}
        whole = len(chosen) == value.projection.width
        columns = None if whole or not chosen else sorted(chosen)
        ports["value"] = PortNode(value.projection.node, value.projection, columns, columns)
    nodes = [node for part in parts for node in part.nodes]
    return dataclasses.replace(parts[0], ports=ports, nodes=nodes)


def _tensor_before_split(parts: list[Match], name: str) -> fx.Node | None:
    """Return the tensor that was split into the heads of all parts, in their order, or None."""
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
    """Return the ports of a host that is one whole module, such as a norm or an embedding.

    The first floating-point input is ``input``; the first input of whole numbers that is used is
    ``ids`` and ``positions``, unless positions are first counted from it, as from a mask. ``rows``
    is what a look-up in a parameter gives. The result has no match if the graph has neither inputs
    nor an output.
    """
    nodes = list(graph.nodes)
    given = [n for n in nodes if n.op == "placeholder" and isinstance(value(n), Tensor)]
    floats = [n for n in given if value(n).is_floating_point() and value(n).dim()]
    whole = [n for n in given if is_integer_tensor(value(n))]
    ports: dict[str, PortNode] = {}
    read = [n for n in whole if n.users and not any(op_name(u) == "cumsum" for u in n.users)]
    if read:
        ports["positions"] = ports["ids"] = PortNode(read[0])
    elif floats and not whole:
        ports["input"] = PortNode(floats[0])
    looked_up = [n for n in nodes if op_name(n) == "embedding" and is_parameter(n.args[1])]
    if len(looked_up) == 1:
        ports["rows"] = PortNode(looked_up[0])
    result: Any = nodes[-1].args[0]
    if isinstance(result, fx.Node) and isinstance(value(result), Tensor):
        ports["output"] = PortNode(result)
    return [Match("module", "", nodes[-1], ports, nodes)] if ports else []
