"""Recognise a feed-forward network (FFN) by its last projection.

    projection -> nonlinearity (-> times another projection) -> projection

The walk starts at a projection and goes back, through nonlinearities and elementwise operations, to
one or two projections of a common source. For experts see experts.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.patterns.dataflow import (
    ACTIVATIONS,
    BATCH_NORMS,
    VIEWS,
    flow,
    inputs,
    is_activation,
    op_name,
    origin,
    value,
    walk_forward,
)
from surgery.patterns.match import Match, PortNode
from surgery.patterns.projection import (
    Projection,
    is_convolution,
    projection,
    walk_back,
)

_FFN_OPS = (
    ACTIVATIONS
    | VIEWS
    | frozenset("mul rmul dropout module clamp add radd sub rsub div truediv addcmul".split())
    | {"layer_norm"}
)


_RESIDUAL_OPS = VIEWS | frozenset(
    "mul rmul dropout module layer_norm rms_norm div truediv where".split()
)


def match_ffn(down: Projection, root: nn.Module) -> Match | None:
    """Return the FFN whose last projection is ``down``, or None if there is none."""
    ends, between, others = walk_back(
        down.source,
        root,
        lambda n: op_name(n) in _FFN_OPS and not _mixes_features(n, root),
        lambda ends, others: bool(others) or len({origin(end.source) for end in ends}) > 2,
    )
    if not ends or others or not any(_is_nonlinear(n, root) for n in between):
        return None
    sources = {origin(end.source) for end in ends}
    if len(sources) == 2:  # of a low-rank update, the second factor reads the first
        low_rank = [end for end in ends if _reads_a_projection(end, sources, root)]
        ends = [end for end in ends if end not in low_rank] if len(low_rank) < len(ends) else ends
        sources = {origin(end.source) for end in ends}
    if len(sources) != 1 or ends[0].in_width != down.width or ends[0].tokens != down.tokens:
        return None
    ports = {
        "input": PortNode(sources.pop(), channels_first=ends[0].channels_first),
        "activation": PortNode(down.source, channels_first=down.channels_first),
        "output": PortNode(down.node, down, channels_first=down.channels_first),
    }
    gated = len(ends) == 2
    if gated:  # the gate is the projection that goes through the nonlinearity
        ends = sorted(ends, key=lambda e: not passes_nonlinearity(e.node, down.source, root))
    for name, end in zip(("gate", "up") if gated else ("up",), ends, strict=False):
        ports[name] = PortNode(end.node, end, channels_first=end.channels_first)
    nodes = [down.node, *(end.node for end in ends), *between]
    key = down.module or str(down.node.meta["owner"])
    return Match("ffn", key, down.node, ports, nodes)


def _mixes_features(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node is a convolution that mixes features: not a depthwise one."""
    if node.op != "call_module":
        return False
    module: Any = root.get_submodule(str(node.target))
    return is_convolution(module) and module.groups == 1


def _reads_a_projection(end: Projection, sources: set[fx.Node], root: nn.Module) -> bool:
    """Whether a projection reads another projection, of one of ``sources`` (a low-rank pair)."""
    first = projection(origin(end.source), root)
    return first is not None and origin(first.source) in sources


def passes_nonlinearity(start: fx.Node, end: fx.Node, root: nn.Module) -> bool:
    """Whether a nonlinearity lies between two nodes."""
    return any(_is_nonlinear(node, root) for node in flow(start, end)[1:])


def _is_nonlinear(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node is an activation function, or a module that acts like one.

    Such a module has no parameters, or is elementwise (a learned activation).
    """
    if op_name(node) in ACTIVATIONS:
        return True
    if node.op != "call_module":
        return False
    module = root.get_submodule(str(node.target))
    affine = (nn.Identity, nn.Dropout, nn.Flatten, nn.Unflatten, *BATCH_NORMS)
    shapes = [getattr(value(n), "shape", None) for n in (node, *inputs(node)[:1])]
    if isinstance(module, affine) or shapes[0] != shapes[-1]:
        return False
    return not any(True for _ in module.parameters()) or _is_elementwise(module, node)


def _is_elementwise(module: nn.Module, node: fx.Node) -> bool:
    """Whether each output element of a module depends on one input element only.

    A norm has parameters of one axis too, but mixes the features. The test changes one feature of
    the example and runs the module: no other feature of the output may change.
    """
    sources = inputs(node)
    x = value(sources[0]) if sources else None
    if not isinstance(x, Tensor) or x.is_meta or any(p.dim() > 1 for p in module.parameters()):
        return False
    other = x.clone()
    other[..., 0] += 1.0
    with torch.no_grad():
        moved = module.forward(x) != module.forward(other)
    return not bool(moved[..., 1:].any())


def joins_residual(match: Match, root: nn.Module) -> bool:
    """Whether the output of an FFN is added to something, as to the residual stream.

    The graph must be the flat one of a model: in that of a host, the sum may lie outside.
    """
    start = match.ports["output"].node
    later = walk_forward(start, lambda n: op_name(n) in _RESIDUAL_OPS and not projection(n, root))
    return any(op_name(n) in ("add", "iadd", "radd") or _adds_inside(n) for n in later)


def _adds_inside(node: fx.Node) -> bool:
    """Whether a module takes two activations of one shape, of which one is the residual stream."""
    shapes = [value(n).shape for n in node.all_input_nodes if is_activation(n)]
    return node.op == "call_module" and len(shapes) > 1 and shapes[0] == shapes[1]
