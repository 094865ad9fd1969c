"""Find the output of an attention behind its context: merged heads and output projections.

    context (B, H, n, d) -> rearranged, gated -> merged (B, n, H d) -> output projection -> output

An attention without output projection has the merged heads as its output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor, fx, nn

from surgery.patterns.dataflow import (
    VIEWS,
    forwarded,
    inputs,
    is_activation,
    op_name,
    upstream,
    value,
    walk_forward,
)
from surgery.patterns.layout import propagate_labels, varies
from surgery.patterns.match import PortNode
from surgery.patterns.projection import Projection, projection

SUMS = frozenset("add iadd radd sub rsub".split())


_CONTEXT_OPS = VIEWS | frozenset(
    "mul rmul dropout cat where masked_fill module repeat layer_norm rms_norm".split()
)


def merged_heads(context: fx.Node, out: Projection) -> PortNode:
    """Return the merged heads: what the output projection reads, or the heads' part of it.

    A block that computes attention and FFN side by side concatenates both in front of one output
    projection.
    """
    whole, example = input_of(out), value(out.source)
    if value(context).numel() == example.numel():
        return whole
    size = value(context).numel()

    def rearranged(node: fx.Node) -> bool:
        """Whether a node holds the context's elements, or some of them."""
        inside = op_name(node) in VIEWS or forwarded(node) is not None
        joined = op_name(node) == "cat" and value(node).numel() <= size
        return inside or joined

    parts = [n for n in walk_forward(context, rearranged) if rearranged(n)]
    if out.source in parts:
        return whole
    tensors = [n for n in (context, *parts) if isinstance(value(n), Tensor)]
    own = [n for n in tensors if value(n).numel() == size and value(n).dim() == example.dim()]
    return dataclasses.replace(whole, node=own[-1]) if own else whole


def _passes_context(
    core: fx.Node, queries: Collection[fx.Node], root: nn.Module, node: fx.Node
) -> bool:
    """Whether an operation may stand between the context and the output projection.

    A sum may, of parts of this attention and of its ``queries`` (pooled ones are added to the
    context, MViTv2); the sum with the residual stream may not.
    """
    if op_name(node) in SUMS:
        parts = [n for n in inputs(node) if is_activation(n)]
        return len(parts) > 1 and all(n in queries or core in upstream(n) for n in parts)
    return op_name(node) in _CONTEXT_OPS and projection(node, root) is None


def outputs_of(
    context: fx.Node, core: fx.Node, queries: Collection[fx.Node], root: nn.Module
) -> list[Projection]:
    """Return the first projections behind the context; of one in two factors, the second."""
    later = walk_forward(context, partial(_passes_context, core, queries, root))
    found = []
    for out in (p for n in later if (p := projection(n, root))):
        after = walk_forward(out.node, lambda n: op_name(n) in VIEWS)
        second = (p for n in after if (p := projection(n, root)) and _are_factors(out, p))
        found.append(next(second, out))
    return found


def _are_factors(first: Projection, second: Projection) -> bool:
    """Whether two projections are the factors of one: of one module, and written alike."""
    return home(second) == home(first) and second.node.op == first.node.op


def without_projection(context: fx.Node, core: fx.Node, root: nn.Module) -> PortNode:
    """Return the output of an attention without output projection: the merged heads."""

    def keeps_features(node: fx.Node) -> bool:
        """Whether a node has the context's features; behind a convolution they are others."""
        mixes = node.op == "call_module" and any(
            p.dim() > 1 for p in root.get_submodule(str(node.target)).parameters()
        )
        return not mixes and _passes_context(core, (), root, node)

    later = walk_forward(context, keeps_features)
    merged = [n for n in later if op_name(n) in VIEWS and is_activation(n) and keeps_features(n)]
    if not merged:
        return PortNode(context)
    return PortNode(merged[-1], channels_first=_features_are_axis_1(context, merged[-1]))


def _features_are_axis_1(context: fx.Node, merged: fx.Node) -> bool:
    """Whether the last axis of a context has become axis 1, as in (B, H d, h, w)."""
    shape = value(context).shape
    features = torch.arange(shape[-1], dtype=torch.int32).expand(shape)
    found = propagate_labels(context, features, merged)
    return found is not None and found.dim() == 4 and varies(found, 1) and not varies(found, -1)


def input_of(proj: Projection) -> PortNode:
    """Return the input of a projection as a port."""
    return PortNode(proj.source, channels_first=proj.channels_first)


def home(proj: Projection) -> str:
    """Return the path of the module that runs a projection: the parent of a linear layer."""
    owner = str(proj.node.meta["owner"])
    return proj.module.rpartition(".")[0] if proj.module else owner
