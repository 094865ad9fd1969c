"""Find the ports of an attention around its core: projections, merged heads and output.

    input -> query, key, value -> query_heads, key_heads, value_heads -> core
    core -> context -> merged -> output

From the heads the walk goes back to the projections, through rearrangements, norms, rotary
encodings and caches. From the context it goes on to the output projection. Then the rows of the
query heads are matched with the tokens of the output; without that match an lse (B, H, n) cannot
be used, and ``missing`` says so.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import takewhile

from torch import fx, nn

from surgery.interop import base_children
from surgery.patterns.attention_output import (
    home,
    input_of,
    merged_heads,
    outputs_of,
    without_projection,
)
from surgery.patterns.dataflow import (
    ARITHMETIC,
    VIEWS,
    flow,
    from_parameters,
    op_name,
    value,
)
from surgery.patterns.layout import columns
from surgery.patterns.match import Match, PortNode
from surgery.patterns.projection import Projection, walk_back
from surgery.patterns.rows import set_rows
from surgery.patterns.scores import before_rotation
from surgery.patterns.streams import pair_outputs, streams_of

PROJECTED_OPS = (
    VIEWS
    | ARITHMETIC
    | frozenset(
        (
            "stack module repeat repeat_interleave update rsqrt sqrt pow mean norm normalize "
            "layer_norm rms_norm view_as_complex view_as_real addcmul pad clamp einsum matmul "
            "copy max amax values sum as_strided gather"
        ).split()
    )
)


def may_precede_heads(root: nn.Module, node: fx.Node) -> bool:
    """Whether an operation may stand between a projection and the heads."""
    if node.op == "call_module":  # a norm or a dropout; a module with children is a network
        return not base_children(root.get_submodule(str(node.target)))
    return op_name(node) in PROJECTED_OPS


def assemble(
    core: fx.Node,
    root: nn.Module,
    query: fx.Node,
    key: fx.Node,
    val: fx.Node,
    context: fx.Node,
    ports: dict[str, PortNode],
    scale: float | None,
    order: tuple[int, ...] | None = None,
) -> list[Match]:
    """Return the match of an attention with all of its ports, one for each of its streams.

    The result is empty if it is no attention.

    Args:
        core: the softmax, or the call that contains it.
        query, key, val, context: the nodes of the heads and of their weighted sum.
        ports: the mask and the weights, if the caller has found them; the others are added.
        scale: the factor of the scores; None if it could not be read.
        order: the axes of ``query`` in the order (B, H, n, d); None if it is (B, H, n, d).
    """
    if key is val and from_parameters(query):
        return []  # learned weights over tensors, such as the outputs of layers: not an attention
    ports |= {
        "query_heads": PortNode(query),
        "key_heads": PortNode(key),
        "value_heads": PortNode(val),
        "context": PortNode(context),
    }
    heads = {"query": query, "key": key, "value": val}
    streams = streams_of(heads, root, partial(may_precede_heads, root))
    chosen = {name: _nearest(node, core, root) for name, node in heads.items()}
    pooled = flow(chosen["query"].node, query) if chosen["query"] else []
    outputs = outputs_of(context, core, pooled, root)
    if not streams:
        streams = [{name: proj for name, proj in chosen.items() if proj is not None}]
        paired = {0: outputs[0]} if outputs else {}
    else:
        paired = pair_outputs(streams, outputs, query, context)
    base = Match("attention", str(core.meta["owner"]), core, ports, [core, context], scale)
    base.order = order
    return [
        _stream(base, number if len(streams) > 1 else 0, own, paired.get(number - 1), root)
        for number, own in enumerate(streams, 1)
    ]


def _nearest(heads: fx.Node, core: fx.Node, root: nn.Module) -> Projection | None:
    """Return the projection that makes heads, one of the attention's own module first."""
    ends, _, _ = walk_back(heads, root, partial(may_precede_heads, root))
    own = (end for end in ends if home(end) == core.meta["owner"])
    return next(own, ends[0] if ends else None)


def _stream(
    base: Match, number: int, own: dict[str, Projection], out: Projection | None, root: nn.Module
) -> Match:
    """Return the match of one stream: ``base`` with the ports of its own projections.

    Nodes and ports of the attention that the streams share stay the same objects.
    """
    found = dataclasses.replace(
        base, ports=dict(base.ports), nodes=list(base.nodes), stream=number,
        uncounted_virtual=[], missing={},
    )  # fmt: skip
    ports, core = found.ports, found.core
    query, key, context = (ports[n].node for n in ("query_heads", "key_heads", "context"))
    if number > 1:
        found.key += f"#stream{number}"
    for name, proj in own.items():
        heads = ports[f"{name}_heads"].node
        if _in_another_layer(proj, core, root):
            found.missing[name] = "another layer computes it"
            continue
        node, chosen = columns(proj, heads, root)
        fused = len(chosen) < proj.width
        exact = node is not proj.node or not fused
        ports[name] = PortNode(
            node, proj, None if exact else chosen, chosen if fused else None,
            channels_first=proj.channels_first,
        )  # fmt: skip
        found.nodes += flow(proj.node, heads)
        if name == "query":
            ports["query_unrotated"] = PortNode(before_rotation(proj.node, query))
    if "query" in ports and ports["query"].projection:
        ports["input"] = input_of(ports["query"].projection)
    ports.setdefault("query_unrotated", PortNode(query))
    order = found.order
    found.heads, found.kv_heads = _count_heads(query, ports, order), _count_heads(key, ports, order)
    if out is not None:
        ports["output"] = PortNode(out.node, out, channels_first=out.channels_first)
        ports["merged"] = merged_heads(context, out)
    elif number:
        ports["output"], ports["merged"] = PortNode(context), PortNode(context)
        found.missing["lse"] = "no output of its own stream is computed"
    else:
        ports["output"] = without_projection(context, core, root)
        ports["merged"] = dataclasses.replace(ports["output"])
    found.nodes += flow(context, ports["output"].node)
    if "lse" not in found.missing:
        set_rows(found)
    return found


def _in_another_layer(proj: Projection, core: fx.Node, root: nn.Module) -> bool:
    """Whether a projection is in another layer than the attention (shared keys and values).

    That is so if the paths of the two differ first at an element of an ``nn.ModuleList``.
    """
    here, there = str(core.meta["owner"]).split("."), home(proj).split(".")
    shared = list(takewhile(lambda pair: pair[0] == pair[1], zip(here, there, strict=False)))
    if len(shared) in (len(here), len(there)):
        return False
    parting = root.get_submodule(".".join(name for name, _ in shared))
    return isinstance(parting, nn.ModuleList)


def _count_heads(heads: fx.Node, ports: dict[str, PortNode], order: tuple[int, ...] | None) -> int:
    """Return H of heads (B, H, n, d); for (B H, n, d), the query's width divided by d.

    The result is 0 if the heads are (B H, n, d) and no projection makes the query.
    """
    shape = value(heads).shape
    if order is not None and len(order) == len(shape):
        return int(shape[order[-3]])
    if len(shape) > 3:
        return int(shape[-3])
    return ports["query"].width // shape[-1] if "query" in ports else 0
