"""Find the ports of an attention around its core: projections, merged heads and output.

    input -> query, key, value -> query_heads, key_heads, value_heads -> core
    core -> context -> merged -> output

From the heads the walk goes back to the projections, through rearrangements, norms, rotary
encodings and caches. From the context it goes on to the output projection. Then the rows of the
query heads are matched with the tokens of the output; without that match an lse (B, H, n) cannot
be used, and ``missing`` says so.
"""

from __future__ import annotations

from functools import partial
from itertools import takewhile

from torch import Tensor, fx, nn

from surgery.interop import base_children
from surgery.patterns.dataflow import (
    ARITHMETIC,
    VIEWS,
    flow,
    from_parameters,
    inputs,
    is_activation,
    op_name,
    upstream,
    value,
    walk_forward,
)
from surgery.patterns.layout import columns, split_rows, token_order
from surgery.patterns.match import Match, PortNode
from surgery.patterns.projection import Projection, projection, walk_back
from surgery.patterns.scores import before_rotation

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


_SUMS = frozenset("add iadd radd sub rsub".split())


_CONTEXT_OPS = VIEWS | frozenset(
    "mul rmul dropout cat where masked_fill module repeat layer_norm rms_norm".split()
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
) -> Match | None:
    """Return the match of an attention with all of its ports, or None if it is not one.

    Args:
        core: the softmax, or the call that contains it.
        query, key, val, context: the nodes of the heads and of their weighted sum.
        ports: the mask and the weights, if the caller has found them; the others are added.
        scale: the factor of the scores; None if it could not be read.
        order: the axes of ``query`` in the order (B, H, n, d); None if it is (B, H, n, d).
    """
    ports |= {
        "query_heads": PortNode(query),
        "key_heads": PortNode(key),
        "value_heads": PortNode(val),
        "context": PortNode(context),
    }
    if key is val and from_parameters(query):
        return None  # learned weights over tensors, such as the outputs of layers: not an attention
    nodes, missing = [core, context], {}
    for name, heads in (("query", query), ("key", key), ("value", val)):
        ends, _, _ = walk_back(heads, root, partial(may_precede_heads, root))
        if not ends:
            continue
        proj = next((end for end in ends if _home(end) == core.meta["owner"]), ends[0])
        if _in_another_layer(proj, core, root):
            missing[name] = "another layer computes it"
            continue
        node, chosen = columns(proj, heads)
        fused = len(chosen) < proj.width
        exact = node is not proj.node or not fused
        ports[name] = PortNode(node, proj, None if exact else chosen, chosen if fused else None)
        nodes += flow(proj.node, heads)
        if name == "query":
            ports["query_unrotated"] = PortNode(before_rotation(proj.node, query))
    if "query" in ports and ports["query"].projection:
        ports["input"] = PortNode(ports["query"].projection.source)
    ports.setdefault("query_unrotated", PortNode(query))
    n_heads, kv_heads = _count_heads(query, ports, order), _count_heads(key, ports, order)
    ports["output"] = _output(context, core, root)
    out = ports["output"].projection
    ports["merged"] = PortNode(out.source if out else ports["output"].node)
    nodes += flow(context, ports["output"].node)
    found = Match(
        "attention", str(core.meta["owner"]), core, ports, nodes, scale, heads=n_heads,
        kv_heads=kv_heads, order=order, missing=missing,
    )  # fmt: skip
    set_rows(found)
    return found


def _output(context: fx.Node, core: fx.Node, root: nn.Module) -> PortNode:
    """Return the output port: the first projection behind the context, or else the merged heads."""

    def passes(node: fx.Node) -> bool:
        if op_name(node) in _SUMS:  # parts of this attention, not the residual stream
            parts = [n for n in inputs(node) if is_activation(n)]
            return len(parts) > 1 and all(core in upstream(n) for n in parts)
        return op_name(node) in _CONTEXT_OPS and projection(node, root) is None

    later = walk_forward(context, passes)
    out = next((p for n in later if (p := projection(n, root))), None)
    if out is None:  # no output projection: the merged heads are the output
        merged = [n for n in later if op_name(n) in VIEWS and is_activation(n)]
        return PortNode(merged[-1] if merged else context)
    after = walk_forward(out.node, lambda n: op_name(n) in VIEWS)
    for node in after:  # a projection of two factors: the second makes the output
        second = projection(node, root)
        if second and _home(second) == _home(out) and second.node.op == out.node.op:
            return PortNode(second.node, second)
    return PortNode(out.node, out)


def _home(proj: Projection) -> str:
    """Return the path of the module that runs a projection: the parent of a linear layer."""
    owner = str(proj.node.meta["owner"])
    return proj.module.rpartition(".")[0] if proj.module else owner


def _in_another_layer(proj: Projection, core: fx.Node, root: nn.Module) -> bool:
    """Whether a projection is in another layer than the attention (shared keys and values).

    That is so if the paths of the two differ first at an element of an ``nn.ModuleList``.
    """
    here, there = str(core.meta["owner"]).split("."), _home(proj).split(".")
    shared = list(takewhile(lambda pair: pair[0] == pair[1], zip(here, there, strict=False)))
    if len(shared) in (len(here), len(there)):
        return False
    parting = root.get_submodule(".".join(name for name, _ in shared))
    return isinstance(parting, nn.ModuleList)


def set_rows(found: Match) -> None:
    """Note in a match how the rows of the query heads belong to the tokens of the output.

    Sets ``sequence_first`` of the output and merged ports, and ``missing["lse"]`` if the query
    heads are not (B, H, n, d) for the n tokens of the output.
    """
    ports, output = found.ports, found.ports["output"]
    proj = ports["query"].projection if "query" in ports else None
    heads = ports["query_unrotated"].node

    def split(x: Tensor) -> Tensor:
        if found.order is not None:
            return x.permute(found.order)
        return x if x.dim() != 3 or not found.heads else split_rows(x, found.heads)

    tokens = value(output.node)
    if proj is None:
        rows = split(value(heads))
        merged = found.heads * value(ports["context"].node).shape[-1]
        fits = rows.dim() == 4 and rows.shape[0] * rows.shape[2] == tokens.shape[:-1].numel()
        fits &= output.projection is not None or tokens.shape[-1] == merged
        order = "batch first" if fits else ""
    else:
        order = token_order(proj, heads, split, tokens)
    output.sequence_first = ports["merged"].sequence_first = order == "sequence first"
    if not order:
        found.missing["lse"] = "its query heads are not (B, H, n, d) for the n tokens of its output"


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
