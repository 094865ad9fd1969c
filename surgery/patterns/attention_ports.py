"""The ports of an attention: its heads' projections, the merged output, and how their rows lie."""

from __future__ import annotations

from functools import partial
from itertools import takewhile

from torch import Tensor, fx, nn

from surgery.patterns.dataflow import (
    ARITHMETIC,
    VIEWS,
    ancestors,
    flow,
    from_parameters,
    inputs,
    is_activation,
    op_name,
    value,
    walk_on,
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


def on_the_way(root: nn.Module, node: fx.Node) -> bool:
    """May this stand between a projection and the heads?"""
    if node.op == "call_module":  # a norm, a dropout; not a network of its own beside the path
        return not any(True for _ in root.get_submodule(str(node.target)).children())
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
    ports |= {
        "query_heads": PortNode(query),
        "key_heads": PortNode(key),
        "value_heads": PortNode(val),
        "context": PortNode(context),
    }
    if key is val and from_parameters(query):
        return None  # learned queries mix tensors as they are (outputs of layers): no attention
    nodes, missing = [core, context], {}
    for name, heads in (("query", query), ("key", key), ("value", val)):
        ends, _, _ = walk_back(heads, root, partial(on_the_way, root))
        if not ends:
            continue
        made = next((end for end in ends if _home(end) == core.meta["owner"]), ends[0])
        if _in_another_layer(made, core, root):
            missing[name] = "another layer computes it"
            continue
        node, chosen = columns(made, heads)
        fused = len(chosen) < made.width
        exact = node is not made.node or not fused
        ports[name] = PortNode(node, made, None if exact else chosen, chosen if fused else None)
        nodes += flow(made.node, heads)
        if name == "query":
            ports["query_unrotated"] = PortNode(before_rotation(made.node, query))
    if "query" in ports and ports["query"].projection:
        ports["input"] = PortNode(ports["query"].projection.source)
    ports.setdefault("query_unrotated", PortNode(query))
    n_heads, kv_heads = _count_heads(query, ports, order), _count_heads(key, ports, order)
    ports["output"] = _output(context, core, root)
    made_of = ports["output"].projection
    ports["merged"] = PortNode(made_of.source if made_of else ports["output"].node)
    nodes += flow(context, ports["output"].node)
    found = Match(
        "attention", str(core.meta["owner"]), core, ports, nodes, scale, heads=n_heads,
        kv_heads=kv_heads, order=order, missing=missing,
    )  # fmt: skip
    set_rows(found)
    return found


def _output(context: fx.Node, core: fx.Node, root: nn.Module) -> PortNode:
    def passes(node: fx.Node) -> bool:
        if op_name(node) in _SUMS:  # of parts of this attention, not with the residual stream
            parts = [n for n in inputs(node) if is_activation(n)]
            return len(parts) > 1 and all(core in ancestors(n) for n in parts)
        return op_name(node) in _CONTEXT_OPS and projection(node, root) is None

    onward = walk_on(context, passes)
    out = next((p for n in onward if (p := projection(n, root))), None)
    if out is None:  # attention without an output projection: the merged heads are its output
        merged = [n for n in onward if op_name(n) in VIEWS and is_activation(n)]
        return PortNode(merged[-1] if merged else context)
    behind = walk_on(out.node, lambda n: op_name(n) in VIEWS)
    for node in behind:  # a second factor of the same projection
        second = projection(node, root)
        if second and _home(second) == _home(out) and second.node.op == out.node.op:
            return PortNode(second.node, second)
    return PortNode(out.node, out)


def _home(made: Projection) -> str:
    owner = str(made.node.meta["owner"])
    return made.module.rpartition(".")[0] if made.module else owner


def _in_another_layer(made: Projection, core: fx.Node, root: nn.Module) -> bool:
    """Do a projection and the attention part ways at a list of layers (shared keys and values)?"""
    here, there = str(core.meta["owner"]).split("."), _home(made).split(".")
    shared = list(takewhile(lambda pair: pair[0] == pair[1], zip(here, there, strict=False)))
    if len(shared) in (len(here), len(there)):
        return False
    parting = root.get_submodule(".".join(name for name, _ in shared))
    return isinstance(parting, nn.ModuleList)


def set_rows(found: Match) -> None:
    """Find out how the rows of the heads belong to the tokens of the output."""
    ports, output = found.ports, found.ports["output"]
    made = ports["query"].projection if "query" in ports else None
    heads = ports["query_unrotated"].node

    def split(x: Tensor) -> Tensor:
        if found.order is not None:
            return x.permute(found.order)
        return x if x.dim() != 3 or not found.heads else split_rows(x, found.heads)

    tokens = value(output.node)
    if made is None:
        rows = split(value(heads))
        merged = found.heads * value(ports["context"].node).shape[-1]
        fits = rows.dim() == 4 and rows.shape[0] * rows.shape[2] == tokens.shape[:-1].numel()
        fits &= output.projection is not None or tokens.shape[-1] == merged
        order = "batch first" if fits else ""
    else:
        order = token_order(made, heads, split, tokens)
    output.sequence_first = ports["merged"].sequence_first = order == "sequence first"
    if not order:
        found.missing["lse"] = "its query heads are not (B, H, n, d) for the n tokens of its output"


def _count_heads(heads: fx.Node, ports: dict[str, PortNode], order: tuple[int, ...] | None) -> int:
    """H from (B, H, n, d); from (B H, n, d) by what the query projection makes of its width."""
    shape = value(heads).shape
    if order is not None and len(order) == len(shape):
        return int(shape[order[-3]])
    if len(shape) > 3:
        return int(shape[-3])
    return ports["query"].width // shape[-1] if "query" in ports else 0
