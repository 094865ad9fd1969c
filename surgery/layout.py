"""Layout: which columns and tokens of a projection reach a head, and where a rotation begins."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from surgery.dataflow import (
    ELEMENTWISE,
    VIEWS,
    flow,
    from_parameters,
    handed_on,
    inputs,
    is_activation,
    op_name,
    value,
)
from surgery.projection import Projection


def columns(made: Projection, end: fx.Node) -> tuple[fx.Node, list[int]]:
    """Which columns of a projection's output flow into ``end``, whatever the layout.

    Labels go through the rearrangements instead of numbers, so a split, a chunk or an interleaved
    view all show which features they pick.

    Returns:
        a node of shape (..., width) that holds just these columns if the graph has one, else that
        of the projection; and the columns, in the order of that node, sorted if it has more.
    """
    start, width = made.node, made.width
    if _only(start, end):
        return start, list(range(width))
    labels: dict[fx.Node, Any] = {start: features(made)}
    reached: set[int] = set()
    for node in flow(start, end)[1:]:
        if not any(n in labels for n in inputs(node)):
            continue
        origin = handed_on(node)
        if origin is not None:
            labels[node] = labels.get(origin)
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
    shape = (*value(start).shape[: -made.axes], len(chosen))
    for node, label in labels.items():
        if isinstance(label, Tensor) and tuple(label.shape) == shape:
            if torch.unique(label).tolist() == chosen:
                return node, label.reshape(-1, len(chosen))[0].tolist()
    return start, chosen


def features(made: Projection) -> Tensor:
    """The output of a projection with each feature's number for a value."""
    shape = value(made.node).shape
    numbers = torch.arange(made.width, dtype=torch.int32).reshape(shape[-made.axes :])
    return numbers.expand(shape)


def _only(start: fx.Node, end: fx.Node) -> bool:
    """Does every element flow on, so that there is nothing to choose?"""
    sizes = {v.numel() for n in flow(start, end) if isinstance(v := value(n), Tensor)}
    if sizes != {value(start).numel()}:
        return False
    copies = {"repeat", "repeat_interleave", "expand", "expand_as", "cat", "stack", "pad", "unfold"}
    return not any(op_name(node) in copies for node in flow(start, end))


def _relabel(node: fx.Node, labels: dict[fx.Node, Any]) -> Any:
    if not inputs(node) or labels.get(inputs(node)[0]) is None:
        return None  # the labels come in as a mere example (of a dtype, of a shape)

    def concrete(n: fx.Node) -> Any:
        return value(n) if labels.get(n) is None else labels[n]

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


def trace(start: fx.Node, label: Tensor, end: fx.Node) -> Tensor | None:
    """What becomes of the elements of ``start``, given as a tensor of labels, on the way to
    ``end``: rearrangements move them, elementwise operations keep them in place.

    None where they get lost in between.
    """
    labels: dict[fx.Node, Any] = {start: label}
    for node in flow(start, end)[1:]:
        origin = handed_on(node)
        if origin is not None:
            labels[node] = labels.get(origin)
        elif op_name(node) in VIEWS:
            labels[node] = _relabel(node, labels)
        elif op_name(node) in ELEMENTWISE:
            shape = getattr(value(node), "shape", None)
            known = [labels[n] for n in inputs(node) if isinstance(labels.get(n), Tensor)]
            labels[node] = next((x for x in known if x.shape == shape), None)
    found = labels.get(end)
    return found if isinstance(found, Tensor) else None


def turned(product: fx.Node, scores: fx.Node) -> bool:
    """Are the scores the transposition of the product (one product, read from both sides)?"""
    columns = torch.arange(value(product).shape[-1], dtype=torch.int32).expand(value(product).shape)
    found = trace(product, columns, scores)
    return found is not None and found.shape[-2] > 1 and varies(found, -2)


def token_order(made: Projection, heads: fx.Node, split: Any, output: Tensor) -> str:
    """How rows of query heads belong to tokens of the output: which axis of it is the batch.

    Args:
        made: the query projection; its tokens lie as those of ``output`` do.
        heads: the query heads; ``split`` makes them (B, H, n, d).

    Returns:
        ``batch first``, ``sequence first``, or "" where (B, H, n) rows are not its tokens.
    """
    tokens = value(made.node).shape[: -made.axes]
    if output.shape[:-1].numel() != tokens.numel():
        return ""
    numbers = torch.arange(tokens.numel(), dtype=torch.int32).reshape(*tokens, *[1] * made.axes)
    rows = trace(made.node, numbers.expand(value(made.node).shape), heads)
    if rows is None:  # lost in between: then by the shapes alone
        rows = value(heads)
        return "batch first" if _rows(split(rows), tokens.numel()) else ""
    rows = split(rows)
    if not _rows(rows, tokens.numel()) or varies(rows, 1) or varies(rows, 3):
        return ""
    order = rows[:, 0, :, 0]  # (B, n)
    if torch.equal(order.flatten(), numbers.flatten()):
        return "batch first"
    behind = torch.equal(order.t().flatten(), numbers.flatten())
    return "sequence first" if behind and output.dim() in (2, 3) else ""


def _rows(heads: Tensor, tokens: int) -> bool:
    return heads.dim() == 4 and heads.shape[0] * heads.shape[2] == tokens


def varies(x: Tensor, axis: int) -> bool:
    """Do labels change along an axis?"""
    return bool((x != x.narrow(axis, 0, 1)).any())


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
    furthest, waist, dtype = 0, start, value(start).dtype
    for i, node in enumerate(region[:mixing]):
        given = value(node)
        if furthest <= i and _like_heads(given, value(end)) and given.dtype == dtype:
            waist = node  # some cast to float32 only to rotate
        furthest = max([furthest, *(position[u] for u in node.users if u in position)])
    return waist if _like_heads(value(waist), value(end)) else end


def stretch(before: Tensor, after: Tensor) -> tuple[float, ...]:
    """By what a rotary encoding multiplies the products of each feature, (d,); empty if by 1.

    A rotation leaves them as they are. Some encodings stretch what they rotate, queries and keys
    alike (YaRN; Peng et al. 2023, arXiv:2309.00071, eq. 22).
    """
    if before is after or before.is_meta or before.shape != after.shape:
        return ()
    a, b = before.double(), after.double()
    turned = (a != b).flatten(0, -2).any(0)
    ratio = b[..., turned].square().sum(-1) / a[..., turned].square().sum(-1)  # of each token
    bound = 0.05 if before.dtype in (torch.float16, torch.bfloat16) else 1e-3
    mean = float(ratio.mean()) if ratio.numel() else 1.0
    if not bool(((ratio - mean).abs() < bound).all()) or abs(mean - 1) < bound:
        return ()  # something else is done to them, too
    return tuple(torch.where(turned, mean, 1.0).tolist())


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
        if op_name(node) == "baddbmm":
            alpha = node.kwargs.get("alpha", 1.0)
            scale *= float(value(alpha) if isinstance(alpha, fx.Node) else alpha)  # type: ignore[arg-type]
            continue
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
