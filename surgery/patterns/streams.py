"""Find the streams of an attention: token sequences with projections of their own.

An attention over text and image may project each with its own weights, and concatenate the tokens
before the softmax, rows of one stream behind rows of the other:

    text  -> query, key, value --cat--+                +--split--> output of the text
                                      +--> attention --+
    image -> query, key, value --cat--+                +--split--> output of the image

A walk back from the heads ends at the projections of all streams. They are told apart by the
concatenation: labels of its operand's tokens vary along the concatenated axis. (Halves of the
features, as of a rotary encoding, are concatenated too; there the labels of tokens do not vary.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.patterns.dataflow import (
    ELEMENTWISE,
    VIEWS,
    flow,
    forwarded,
    inputs,
    op_name,
    origin,
    value,
)
from surgery.patterns.layout import rearrange_labels, token_numbers, varies
from surgery.patterns.projection import Projection, projection, walk_back

Passes = Callable[[fx.Node], bool]


def streams_of(
    heads: dict[str, fx.Node], root: nn.Module, passes: Passes
) -> list[dict[str, Projection]]:
    """Return the projections of each stream, by the name of the port; one stream gives nothing.

    Args:
        heads: the nodes of the heads by the ports that their projections make: query, key, value.
        passes: what may stand between a projection and the heads.
    """
    found = {name: _concatenated(node, root, passes) for name, node in heads.items()}
    count = max(map(len, found.values()))
    if count < 2:
        return []
    if all(len(each) == count for each in found.values()):
        rows = zip(*found.values(), strict=True)
        return [dict(zip(found, each, strict=True)) for each in rows]
    by_source: dict[fx.Node, dict[str, Projection]] = {}
    for name, projections in found.items():
        for each in projections or walk_back(heads[name], root, passes)[0][:1]:
            by_source.setdefault(origin(each.source), {})[name] = each
    return list(by_source.values())


def _concatenated(heads: fx.Node, root: nn.Module, passes: Passes) -> list[Projection]:
    """Return the projections whose tokens are concatenated to ``heads``, in their order."""
    queue, seen = [heads], {heads}
    while queue:
        node = queue.pop(0)
        if op_name(node) == "cat":
            found = [_of_tokens(operand, node, root, passes) for operand in _operands(node)]
            known = [each for each in found if each is not None]
            if len(known) > 1 and len({each.node for each in known}) == len(known):
                return known
        if projection(node, root) is None and (passes(node) or forwarded(node)):
            fresh = [n for n in inputs(node) if n not in seen]
            seen.update(fresh)
            queue += fresh
    return []


def _of_tokens(
    operand: fx.Node, cat: fx.Node, root: nn.Module, passes: Passes
) -> Projection | None:
    """Return the projection of an operand of ``cat`` that is concatenated along its tokens."""
    ends, _, _ = walk_back(operand, root, passes)
    if len(ends) != 1:
        return None
    labels = propagate_rows(ends[0].node, token_numbers(ends[0]), operand)
    axis = _axis(cat)
    if labels is None or labels.shape[axis] < 2 or not varies(labels, axis):
        return None
    return ends[0]


def _operands(cat: fx.Node) -> list[fx.Node]:
    given: Any = cat.args[0] if cat.args else cat.kwargs.get("tensors")
    return [n for n in given if isinstance(n, fx.Node)] if isinstance(given, (list, tuple)) else []


def _axis(cat: fx.Node) -> int:
    given: Any = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    return int(given) if isinstance(given, int) else 0


def pair_outputs(
    streams: list[dict[str, Projection]],
    outputs: list[Projection],
    query: fx.Node,
    context: fx.Node,
) -> dict[int, Projection]:
    """Return the output projection of each stream that has one, by the stream's number from 0.

    Labels of the streams' rows are propagated from the query heads' shape to what the output
    projections read. A projection of all rows is the output of the first stream.
    """
    asking = [number for number, own in enumerate(streams) if "query" in own]
    if len(asking) == 1:
        return dict(zip(asking, outputs[:1], strict=False))
    shape = value(context).shape
    rows = torch.full((*shape[:-1], 1), -1, dtype=torch.int32)
    for number, own in enumerate(streams):
        if "query" not in own:
            continue
        labels = propagate_rows(own["query"].node, token_numbers(own["query"]), query)
        if labels is None or labels.shape[:-1] != shape[:-1]:
            return {}
        rows = torch.where(labels[..., :1] >= 0, number, rows)
    found: dict[int, Projection] = {}
    for out in outputs:
        labels = propagate_rows(context, rows.expand(shape), out.source)
        if labels is not None:
            there = sorted(set(torch.unique(labels).tolist()) - {-1})
            found.setdefault(there[0] if there else 0, out)
    return found


def propagate_rows(start: fx.Node, label: Tensor, end: fx.Node) -> Tensor | None:
    """Propagate labels of tokens from ``start`` to ``end``, as far as they are known.

    What a concatenation adds from elsewhere gets the label -1. A rotary encoding in complex numbers
    keeps the labels of tokens, as all features of a token have one label.
    """
    labels: dict[fx.Node, Any] = {start: label}
    for node in flow(start, end)[1:]:
        source, name = forwarded(node), op_name(node)
        known = [labels[n] for n in inputs(node) if isinstance(labels.get(n), Tensor)]
        if source is not None:
            labels[node] = labels.get(source)
        elif name in ("cat", "stack"):
            labels[node] = _joined(node, labels)
        elif name in VIEWS:
            labels[node] = rearrange_labels(node, labels)
        elif name == "view_as_complex" and known:
            labels[node] = known[0][..., 0]
        elif name == "view_as_real" and known:
            labels[node] = known[0].unsqueeze(-1).expand(value(node).shape)
        elif name in ELEMENTWISE or name in ("rms_norm", "normalize"):
            shape = getattr(value(node), "shape", None)
            labels[node] = next((x for x in known if x.shape == shape), None)
    found = labels.get(end)
    return found if isinstance(found, Tensor) else None


def _joined(node: fx.Node, labels: dict[fx.Node, Any]) -> Tensor | None:
    """Return the labels of a concatenation, -1 for operands without labels."""

    def label(n: fx.Node) -> Any:
        if isinstance(labels.get(n), Tensor):
            return labels[n]
        return torch.full(value(n).shape, -1, dtype=torch.int32)

    parts = [label(n) for n in _operands(node)]
    join: Any = torch.cat if op_name(node) == "cat" else torch.stack
    try:
        joined: Tensor = join(parts, _axis(node))
    except (RuntimeError, IndexError):
        return None
    return joined
