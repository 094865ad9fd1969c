"""Layout: which columns and tokens of a projection reach a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgery.patterns.dataflow import (
    ELEMENTWISE,
    VIEWS,
    flow,
    handed_on,
    inputs,
    op_name,
    value,
)
from surgery.patterns.projection import Projection


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

    def held(n: fx.Node) -> Any:
        return value(n) if labels.get(n) is None else labels[n]

    if op_name(node) in ("to", "type", "float", "half", "bfloat16", "type_as", "requires_grad_"):
        return held(node.all_input_nodes[0])
    args = fx.node.map_arg(node.args, held)
    kwargs = fx.node.map_arg(node.kwargs, held)
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


def split_rows(heads: Tensor, n_heads: int) -> Tensor:
    """(B H, n, d) -> (B, H, n, d)."""
    return heads.reshape(-1, n_heads, *heads.shape[-2:])
