"""Find out which columns and tokens of a projection reach the heads, by propagating labels.

A graph rearranges a projection's output in many ways: views, splits, chunks, interleaved heads.
Instead of interpreting each, the functions here run the graph's own rearrangements on a tensor of
labels, the number of each column or token. The labels that arrive are the answer, in their order.

Elementwise operations keep labels in place. Other operations lose them, and every caller has an
answer for that case. Labels are int32 tensors in the shape of the example, so the cost is that of
the rearrangements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.patterns.dataflow import (
    BATCH_NORMS,
    ELEMENTWISE,
    VIEWS,
    flow,
    forwarded,
    inputs,
    op_name,
    value,
)
from surgery.patterns.projection import Projection, features_last, is_convolution


def columns(proj: Projection, end: fx.Node, root: nn.Module) -> tuple[fx.Node, list[int]]:
    """Return which columns of a projection's output flow into ``end``, in any layout.

    Where labels are lost, all columns that reach that place count.

    Returns:
        a node and the columns. If the graph has a node (..., columns) with just these columns, it
        is that node, and the columns are in its order. Else it is the node of the projection, and
        the columns are sorted.
    """
    start, width = proj.node, proj.width
    if _keeps_all_elements(start, end):
        return start, list(range(width))
    labels: dict[fx.Node, Any] = {start: features(proj)}
    reached: set[int] = set()
    for node in flow(start, end)[1:]:
        if not any(n in labels for n in inputs(node)):
            continue
        source = forwarded(node)
        if source is not None:
            labels[node] = labels.get(source)
        elif op_name(node) in VIEWS:
            labels[node] = rearrange_labels(node, labels)
        elif _keeps_channels(node, root):
            labels[node] = _channel_labels(node, labels)
        if labels.get(node) is None:
            labels.pop(node, None)
            sources = [n for n in inputs(node) if isinstance(labels.get(n), Tensor)]
            reached.update(x for n in sources for x in torch.unique(labels[n]).tolist())
    if isinstance(labels.get(end), Tensor):
        reached.update(torch.unique(labels[end]).tolist())
    chosen = sorted(reached) or list(range(width))
    if len(chosen) == width:
        return start, chosen
    shape = (*proj.tokens, len(chosen))
    for node, label in labels.items():
        if not isinstance(label, Tensor) or label.dim() < 2:
            continue
        label = features_last(label, proj.channels_first)
        if tuple(label.shape) == shape and torch.unique(label).tolist() == chosen:
            return node, label.reshape(-1, len(chosen))[0].tolist()
    return start, chosen


def features(proj: Projection) -> Tensor:
    """Return labels for the output of a projection: each feature's number, in its shape."""
    numbers = torch.arange(proj.width, dtype=torch.int32)
    shape = features_last(value(proj.node), proj.channels_first).shape
    labels = numbers.reshape(shape[-proj.axes :]).expand(shape)
    return labels.movedim(-1, 1) if proj.channels_first else labels


def token_numbers(proj: Projection) -> Tensor:
    """Return labels for the output of a projection: each token's number, in its shape."""
    tokens = proj.tokens
    numbers = torch.arange(tokens.numel(), dtype=torch.int32).reshape(*tokens, *[1] * proj.axes)
    labels = numbers.expand(features_last(value(proj.node), proj.channels_first).shape)
    return labels.movedim(-1, 1) if proj.channels_first else labels


def _keeps_all_elements(start: fx.Node, end: fx.Node) -> bool:
    """Whether all elements of ``start`` flow into ``end``, once each, so no columns are chosen."""
    sizes = {v.numel() for n in flow(start, end) if isinstance(v := value(n), Tensor)}
    if sizes != {value(start).numel()}:
        return False
    copies = {"repeat", "repeat_interleave", "expand", "expand_as", "cat", "stack", "pad", "unfold"}
    return not any(op_name(node) in copies for node in flow(start, end))


def _keeps_channels(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node is a module that keeps channels apart: batch norm, depthwise convolution."""
    if node.op != "call_module":
        return False
    module: Any = root.get_submodule(str(node.target))
    if is_convolution(module):
        return bool(module.groups == module.in_channels == module.out_channels)
    return isinstance(module, (*BATCH_NORMS, nn.Dropout, nn.Identity))


def _channel_labels(node: fx.Node, labels: dict[fx.Node, Any]) -> Any:
    """Return labels behind a module that keeps channels apart, (B, C, ...); None if lost."""
    label, shape = labels.get(inputs(node)[0]), value(node).shape
    if not isinstance(label, Tensor) or label.shape == shape:
        return label
    first = label[(slice(None), slice(None), *[slice(0, 1)] * (label.dim() - 2))]
    if label.shape[:2] != shape[:2] or bool((label != first).any()):
        return None
    return first.expand(shape)


def rearrange_labels(node: fx.Node, labels: dict[fx.Node, Any]) -> Any:
    """Run one rearrangement on the labels of its input; None if that is impossible."""
    if not inputs(node) or labels.get(inputs(node)[0]) is None:
        return None  # the labelled tensor gives only its dtype or shape, as in view_as(other)

    def label_or_value(n: fx.Node) -> Any:
        return value(n) if labels.get(n) is None else labels[n]

    if op_name(node) in ("to", "type", "float", "half", "bfloat16", "type_as", "requires_grad_"):
        return label_or_value(node.all_input_nodes[0])
    args = fx.node.map_arg(node.args, label_or_value)
    kwargs = fx.node.map_arg(node.kwargs, label_or_value)
    try:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, IndexError):
        return None


def propagate_labels(start: fx.Node, label: Tensor, end: fx.Node) -> Tensor | None:
    """Propagate a tensor of labels from ``start`` to ``end``.

    Rearrangements move labels, and elementwise operations keep them in place. The result is None
    if another operation loses them in between.
    """
    labels: dict[fx.Node, Any] = {start: label}
    for node in flow(start, end)[1:]:
        source = forwarded(node)
        if source is not None:
            labels[node] = labels.get(source)
        elif op_name(node) in VIEWS:
            labels[node] = rearrange_labels(node, labels)
        elif op_name(node) in ELEMENTWISE:
            shape = getattr(value(node), "shape", None)
            known = [labels[n] for n in inputs(node) if isinstance(labels.get(n), Tensor)]
            labels[node] = next((x for x in known if x.shape == shape), None)
    found = labels.get(end)
    return found if isinstance(found, Tensor) else None


def is_transposed(product: fx.Node, scores: fx.Node) -> bool:
    """Whether scores are the transpose of a product.

    Some models compute one product and attend in both directions; then the product's second
    operand has the queries of the transposed scores.
    """
    numbers = torch.arange(value(product).shape[-1], dtype=torch.int32).expand(value(product).shape)
    found = propagate_labels(product, numbers, scores)
    return found is not None and found.shape[-2] > 1 and varies(found, -2)


def token_order(proj: Projection, heads: fx.Node, split: Any, output: Tensor) -> str:
    """Return how the rows of query heads belong to the tokens of the output.

    Args:
        proj: the query projection; its tokens are laid out as those of ``output``.
        heads: the query heads; ``split`` makes them (B, H, n, d).
        output: the value of the output, with the width as its last axis.

    Returns:
        ``batch first`` for an output (B, n, D), ``sequence first`` for (n, B, D), and "" if rows
        (B, H, n) are not the tokens of the output.
    """
    tokens = proj.tokens
    if output.shape[:-1].numel() != tokens.numel():
        return ""
    numbers = torch.arange(tokens.numel(), dtype=torch.int32)
    rows = propagate_labels(proj.node, token_numbers(proj), heads)
    if rows is None:  # the labels are lost in between: decide by the shapes alone
        rows = value(heads)
        return "batch first" if _has_rows_of_tokens(split(rows), tokens.numel()) else ""
    rows = split(rows)
    if not _has_rows_of_tokens(rows, tokens.numel()) or varies(rows, 1) or varies(rows, 3):
        return ""
    tokens_of_rows = rows[:, 0, :, 0]  # (B, n)
    if torch.equal(tokens_of_rows.flatten(), numbers):
        return "batch first"
    transposed = torch.equal(tokens_of_rows.t().flatten(), numbers)
    return "sequence first" if transposed and output.dim() in (2, 3) else ""


def _has_rows_of_tokens(heads: Tensor, tokens: int) -> bool:
    """Whether heads are (B, H, n, d) with B n tokens."""
    return heads.dim() == 4 and heads.shape[0] * heads.shape[2] == tokens


def varies(x: Tensor, axis: int) -> bool:
    """Whether labels change along an axis."""
    return bool((x != x.narrow(axis, 0, 1)).any())


def split_rows(heads: Tensor, n_heads: int) -> Tensor:
    """Split the rows of heads, (B H, n, d) -> (B, H, n, d)."""
    return heads.reshape(-1, n_heads, *heads.shape[-2:])
