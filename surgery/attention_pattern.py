"""The attention pattern: Q K^T -> ... -> softmax -> ... -> (softmax) V, or one call for it all."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from surgery.dataflow import (
    PRODUCTS,
    VIEWS,
    flow,
    is_activation,
    is_parameter,
    op_name,
    projection,
    value,
    walk_back,
    walk_on,
)
from surgery.layout import batch_axis, before_rotation, columns, scalars_between
from surgery.pattern import Pattern, PortNode

# What may stand between scores and softmax, and between softmax and its product with the values.
_ARITHMETIC = frozenset(
    "add iadd radd sub rsub mul imul rmul div truediv itruediv neg where cat dropout".split()
)
_SCORE_OPS = (
    VIEWS
    | _ARITHMETIC
    | frozenset(
        "masked_fill masked_fill_ tanh clamp max min maximum amax nan_to_num add_ softmax "
        "module".split()
    )
)
_PROJECTED_OPS = (
    VIEWS
    | _ARITHMETIC
    | frozenset(
        (
            "stack module repeat repeat_interleave update rsqrt sqrt pow mean norm normalize "
            "layer_norm rms_norm view_as_complex view_as_real addcmul pad clamp einsum matmul "
            "copy"
        ).split()
    )
)
_CONTEXT_OPS = VIEWS | frozenset(
    "mul rmul dropout cat where masked_fill module repeat layer_norm rms_norm".split()
)


def attention_pattern(node: fx.Node, root: nn.Module) -> Pattern | None:
    if node.meta.get("attention"):
        return _from_call(node, root, first=1)
    name = op_name(node)
    if name == "scaled_dot_product_attention":
        return _from_call(node, root, first=0)
    return _from_softmax(node, root) if name == "softmax" else None


def _from_call(node: fx.Node, root: nn.Module, first: int) -> Pattern | None:
    names = ("query", "key", "value", "attention_mask" if first else "attn_mask")
    given: dict[str, Any] = dict(zip(names, node.args[first:], strict=False)) | dict(node.kwargs)
    heads = [given.get(n) for n in names[:3]]
    if not all(isinstance(h, fx.Node) for h in heads):
        return None
    scale = given.get("scaling" if first else "scale")
    context: fx.Node = node
    ports: dict[str, PortNode] = {}
    if first:
        parts = {u.args[1]: u for u in node.users if op_name(u) == "getitem"}
        context = parts.get(0, node)
        if isinstance(value(parts.get(1)), Tensor):
            ports["weights"] = PortNode(parts[1])
    mask = given.get(names[3])
    if isinstance(mask, fx.Node) and isinstance(value(mask), Tensor):
        ports["mask"] = PortNode(mask)
    query, key, val = (h for h in heads if isinstance(h, fx.Node))
    return _assemble(node, root, query, key, val, context, ports, _number(scale))


def _from_softmax(node: fx.Node, root: nn.Module) -> Pattern | None:
    scores = next((n for n in node.all_input_nodes if is_activation(n)), None)
    if scores is None or value(scores).dim() < 3:
        return None
    product = _product_behind(scores, root)
    if product is None:
        return None
    operands = [n for n in product.all_input_nodes if is_activation(n)]
    if op_name(product) == "baddbmm":
        operands = operands[-2:]
    later = [node, *walk_on(node, lambda n: op_name(n) in _SCORE_OPS)]
    mixed = next((n for n in later if op_name(n) in PRODUCTS), None)
    if mixed is None:
        return None
    others = [n for n in mixed.all_input_nodes if is_activation(n) and n not in later]
    if not others:
        return None
    query, key = operands[0], _untransposed(operands[1], operands[0])
    weights = next(n for n in mixed.all_input_nodes if n in later)
    found = _assemble(
        node, root, query, key, others[0], mixed, {"weights": PortNode(weights)},
        scalars_between(flow(product, scores)),
    )  # fmt: skip
    found.softmax_input = scores
    found.nodes += [*flow(product, node), *flow(node, mixed)]
    return found


def _product_behind(scores: fx.Node, root: nn.Module) -> fx.Node | None:
    """The product of two activations that the scores come from."""
    queue, seen = [scores], {scores}
    found: list[fx.Node] = []
    while queue:
        node = queue.pop(0)
        if op_name(node) in PRODUCTS:
            operands = [n for n in node.all_input_nodes if is_activation(n)]
            if len(operands) >= 2 and not any(is_parameter(n) for n in operands):
                found.append(node)
            continue
        if op_name(node) not in _SCORE_OPS or projection(node, root):
            continue
        for before in node.all_input_nodes:
            if is_activation(before) and before not in seen:
                seen.add(before)
                queue.append(before)
    if not found:
        return None
    order = {n: i for i, n in enumerate(scores.graph.nodes)}
    return min(found, key=lambda n: order[n])


def _untransposed(key: fx.Node, query: fx.Node) -> fx.Node:
    """The key heads before the transposition that the product needs."""
    if op_name(key) in ("transpose", "permute", "mT", "swapaxes"):
        before = key.all_input_nodes[0]
        if value(before).shape[-1] == value(query).shape[-1]:
            return before
    return key


def _assemble(
    core: fx.Node,
    root: nn.Module,
    query: fx.Node,
    key: fx.Node,
    val: fx.Node,
    context: fx.Node,
    ports: dict[str, PortNode],
    scale: float | None,
) -> Pattern:
    ports |= {
        "query_heads": PortNode(query),
        "key_heads": PortNode(key),
        "value_heads": PortNode(val),
        "context": PortNode(context),
    }
    nodes = [core, context]
    for name, heads in (("query", query), ("key", key), ("value", val)):
        ends, _, _ = walk_back(heads, root, lambda n: op_name(n) in _PROJECTED_OPS)
        if not ends:
            continue
        node, chosen = columns(ends[0].node, heads)
        fused = len(chosen) < ends[0].width
        exact = node is not ends[0].node or not fused
        ports[name] = PortNode(node, ends[0], None if exact else chosen)
        nodes += flow(ends[0].node, heads)
        if name == "query":
            ports["query_unrotated"] = PortNode(before_rotation(ends[0].node, query))
    if "query" in ports and ports["query"].projection:
        ports["input"] = PortNode(ports["query"].projection.source)
    ports.setdefault("query_unrotated", PortNode(query))
    n_heads, kv_heads = _count_heads(query, ports), _count_heads(key, ports)
    onward = walk_on(context, lambda n: op_name(n) in _CONTEXT_OPS and not projection(n, root))
    out = next((p for n in onward if (p := projection(n, root))), None)
    if out is not None:
        ports["output"] = PortNode(out.node, out)
    else:  # attention without an output projection: the merged heads are its output
        merged = [n for n in onward if op_name(n) in VIEWS and is_activation(n)]
        ports["output"] = PortNode(merged[-1] if merged else context)
    nodes += flow(context, ports["output"].node)
    ports["output"].sequence_first = batch_axis(context, ports["output"], n_heads) == 1
    key_path = str(core.meta["owner"])
    return Pattern(
        "attention", key_path, core, ports, nodes, scale, heads=n_heads, kv_heads=kv_heads
    )


def _count_heads(heads: fx.Node, ports: dict[str, PortNode]) -> int:
    """H from (B, H, n, d); from (B H, n, d) by what the query projection makes of its width."""
    shape = value(heads).shape
    if len(shape) > 3:
        return int(shape[-3])
    return ports["query"].width // shape[-1] if "query" in ports else 0


def _number(x: Any) -> float | None:
    x = value(x) if isinstance(x, fx.Node) else x
    return float(x) if isinstance(x, (int, float)) else None
