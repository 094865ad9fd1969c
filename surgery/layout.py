"""Layout: which columns of a projection reach a head, and where a rotation begins."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from surgery.dataflow import (
    VIEWS,
    ancestors,
    flow,
    from_parameters,
    handed_on,
    inputs,
    is_activation,
    op_name,
    value,
)


def columns(start: fx.Node, end: fx.Node) -> tuple[fx.Node, list[int]]:
    """Which columns of a projection's output flow into ``end``, whatever the layout.

    Labels go through the rearrangements instead of numbers, so a split, a chunk or an interleaved
    view all show which features they pick.

    Returns:
        a node of shape (..., width) that holds just these columns if the graph has one, else
        ``start``; and the columns, sorted.
    """
    width = value(start).shape[-1]
    labels: dict[fx.Node, Any] = {start: torch.arange(width).expand(value(start).shape)}
    behind = ancestors(end)
    reached: set[int] = set()
    for node in list(start.graph.nodes):
        if node not in behind or node in labels or not any(n in labels for n in inputs(node)):
            continue
        origin = handed_on(node)
        if origin is not None:
            labels[node] = labels[origin]
        elif op_name(node) in VIEWS:
            labels[node] = _relabel(node, labels)
        if labels.get(node) is None:
            labels.pop(node, None)
            sources = [n for n in inputs(node) if isinstance(labels.get(n), Tensor)]
            reached.update(x for n in sources for x in torch.unique(labels[n]).tolist())
    if isinstance(labels.get(end), Tensor):
        reached.update(torch.unique(labels[end]).tolist())
    chosen = sorted(reached) or list(range(width))
    if len(chosen) == width:
        return start, chosen
    shape = (*value(start).shape[:-1], len(chosen))
    for node, label in labels.items():
        if isinstance(label, Tensor) and tuple(label.shape) == shape:
            if torch.unique(label).tolist() == chosen:
                return node, chosen
    return start, chosen


def _relabel(node: fx.Node, labels: dict[fx.Node, Any]) -> Any:
    if not inputs(node) or inputs(node)[0] not in labels:
        return None  # the labels come in as a mere example (of a dtype, of a shape)

    def concrete(n: fx.Node) -> Any:
        return labels[n] if n in labels else value(n)

    if op_name(node) in ("to", "type", "float", "half", "bfloat16", "type_as", "requires_grad_"):
        return concrete(node.all_input_nodes[0])
    args = fx.node.map_arg(node.args, concrete)
    kwargs = fx.node.map_arg(node.kwargs, concrete)
    try:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, IndexError):
        return None


def batch_axis(context: fx.Node, output: Any, heads: int) -> int:
    """Which axis of the attention's output is the batch: 0, or 1 where the sequence comes first.

    The batch numbers of (B H, n, d) heads are followed through the rearrangements, as in
    :func:`columns`. Heads (B, H, n, d) have their batch in front, and so has what they become.
    """
    mixed = value(context)
    if output.projection is None or mixed.dim() != 3 or not heads or mixed.shape[0] % heads:
        return 0
    numbers = torch.arange(mixed.shape[0]) // heads
    labels: dict[fx.Node, Any] = {context: numbers[:, None, None].expand(mixed.shape)}
    source = output.projection.source
    for node in flow(context, source)[1:]:
        origin = handed_on(node)
        labels[node] = labels.get(origin) if origin else _relabel(node, labels)
        if not isinstance(labels[node], Tensor):
            return 0
    rows = labels[source]
    varies = [bool((rows != rows.narrow(axis, 0, 1)).any()) for axis in range(rows.dim() - 1)]
    return varies.index(True) if True in varies else 0


def before_rotation(start: fx.Node, end: fx.Node) -> fx.Node:
    """The query heads before a rotary encoding: the last waist of the flow before it is mixed.

    Between the projection ``start`` and the heads ``end``, a rotary encoding is the first place
    that brings in a tensor which is neither a parameter nor made from the projection. A waist is a
    node through which everything flows. Without a rotation this is ``end`` itself.
    """
    region = flow(start, end)
    position = {node: i for i, node in enumerate(region)}
    mixing = next(
        (i for i, n in enumerate(region) if i and _mixes(n, position)),
        None,
    )
    if mixing is None:
        return end
    furthest, waist = 0, start
    for i, node in enumerate(region[:mixing]):
        if furthest <= i and _like_heads(value(node), value(end)):
            waist = node
        furthest = max([furthest, *(position[u] for u in node.users if u in position)])
    return waist if _like_heads(value(waist), value(end)) else end


def _like_heads(x: Any, heads: Tensor) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.shape == heads.shape


def _mixes(node: fx.Node, position: dict[fx.Node, int]) -> bool:
    others = [n for n in node.all_input_nodes if n not in position and not from_parameters(n)]
    return op_name(node) in ("mul", "einsum", "where", "matmul", "addcmul") and any(
        map(is_activation, others)
    )


def causal(weights: Tensor) -> bool:
    """Does no query see a later key, in these weights (..., n, m) or this mask of what is seen?"""
    n, m = weights.shape[-2:]
    if weights.is_meta or n < 2:
        return False
    later = torch.ones(n, m, dtype=torch.bool, device=weights.device).triu(m - n + 1)
    return bool((weights[..., later] == 0).all()) if later.any() else False


def scalars_between(nodes: Iterable[fx.Node]) -> float:
    """The product of the numbers that the given nodes multiply or divide by."""
    scale = 1.0
    for node in nodes:
        numbers = [a for a in node.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
        others = [a for a in node.all_input_nodes if isinstance(value(a), (int, float))]
        number = numbers[0] if numbers else value(others[0]) if others else None
        tensors = [value(a) for a in node.all_input_nodes if isinstance(value(a), Tensor)]
        if (
            number is None
            and len(tensors) == 2
            and not tensors[1].is_meta
            and tensors[1].dim() == 0
        ):
            number = tensors[1].item()
        if number is None or math.isinf(number):
            continue
        if op_name(node) in ("mul", "rmul", "imul"):
            scale *= number
        elif op_name(node) in ("div", "truediv", "itruediv"):
            scale /= number
    return scale
