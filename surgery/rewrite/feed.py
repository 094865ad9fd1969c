"""Put an inserted module between a port's projection and what the projection reads.

    P(x) -> P(child(x))

A fused projection makes other ports, too, so the port first gets a call of its own.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from surgery.patterns import Match, PortNode, input_of_call, module_call_of
from surgery.plugin import Edit
from surgery.rewrite.casts import cast, needed_cast
from surgery.rewrite.channels import (
    as_channels,
    features_to_the_end,
    flat_features,
    shaped_as,
    tokens_of,
)
from surgery.rewrite.nodes import calling, chain, column_functions, device_of, put
from surgery.rewrite.partly import Partly


def feed(match: Match, edit: Edit, child: str, root: nn.Module, partly: Partly | None) -> None:
    """Turn the port's projection ``P(x)`` into ``P(child(x))``."""
    features_to_the_end(match)
    port = match.ports[edit.port]
    projection = port.projection
    assert projection is not None  # Port.feed refuses a port that no projection makes
    graph = projection.node.graph
    if port.own is None and port.features is not None:
        _split_off(match, port)
    port.own = port.own or module_call_of(projection.node)
    source = input_of_call(port.own)
    alone = partly is None or partly.children is None  # a group casts for each of its modules
    dtype = needed_cast(source, root.get_submodule(child)) if alone else None

    def build(x: fx.Node, _: Any, callee: fx.Node | None) -> fx.Node:
        steps: list[Any] = []
        back: list[Any] = []
        if projection.channels_first:
            steps, back = [(tokens_of, (x,))], [(as_channels, (..., x))]
        elif projection.in_axes > 1:
            steps, back = [(flat_features, (x, projection.in_axes))], [(shaped_as, (..., x))]
        if dtype is not None:
            steps.append((cast, (... if steps else x, dtype)))
            back.append((put, (x, ...)))
        return chain(graph, *steps, calling(child, callee, (... if steps else x,)), *back)

    with graph.inserting_before(port.own):
        fed = build(source, (), None) if partly is None else partly.around(build, source, (), ())
    fed.meta.update(value=source.meta.get("value"), owner=source.meta.get("owner"))
    port.own.replace_input_with(source, fed)


def _split_off(match: Match, port: PortNode) -> None:
    """Call a fused projection once more, for the columns of one port alone.

    The columns of the first call are overwritten by those of the second, so readers of the whole
    still find everything in one tensor.
    """
    assert port.projection is not None
    assert port.features is not None
    fused = column_functions(port.features, device_of(port))
    raw = port.projection.node
    graph = raw.graph
    copies: dict[fx.Node, fx.Node] = {}
    last = raw
    for node in dict.fromkeys((module_call_of(raw), raw)):
        with graph.inserting_after(last):
            copies[node] = last = graph.node_copy(node, lambda n: copies.get(n, n))
    with graph.inserting_after(last):
        if port.projection.axes == 1:
            new = chain(graph, (fused.take, (last,)), (fused.put, (raw, ...)))
        else:
            axes = port.projection.axes
            whole = chain(graph, (flat_features, (raw, axes)))
            with graph.inserting_after(whole):
                own = chain(graph, (flat_features, (last, axes)), (fused.take, (...,)))
            with graph.inserting_after(own):
                new = chain(graph, (fused.put, (whole, own)), (shaped_as, (..., raw)))
            copies[whole] = whole
    new.meta.update(raw.meta)
    keep_raw = {new, *copies.values()}
    raw.replace_all_uses_with(new, delete_user_cb=lambda user: user not in keep_raw)
    for other in match.ports.values():
        if other.node is raw:
            other.node = new
    port.own = copies[module_call_of(raw)]
