"""The FFN pattern: projection -> nonlinearity (-> times another projection) -> projection."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from surgery.patterns.dataflow import (
    ACTIVATIONS,
    VIEWS,
    flow,
    inputs,
    is_activation,
    op_name,
    origin,
    value,
    walk_on,
)
from surgery.patterns.match import Match, PortNode
from surgery.patterns.projection import Projection, projection, stacks_weights, walk_back

_FFN_OPS = (
    ACTIVATIONS
    | VIEWS
    | frozenset("mul rmul dropout module clamp add radd sub rsub div truediv addcmul".split())
    | {"layer_norm"}
)


_RESIDUAL_OPS = VIEWS | frozenset(
    "mul rmul dropout module layer_norm rms_norm div truediv where".split()
)


def ffn_pattern(down: Projection, root: nn.Module) -> Match | None:
    ends, between, loose = walk_back(down.source, root, lambda n: op_name(n) in _FFN_OPS)
    if not ends or loose or not any(_nonlinear(n, root) for n in between):
        return None
    sources = {origin(end.source) for end in ends}
    if len(sources) == 2:  # a low-rank update beside a projection is no second source
        low = [end for end in ends if _follows(end, sources, root)]
        ends = [end for end in ends if end not in low] if len(low) < len(ends) else ends
        sources = {origin(end.source) for end in ends}
    if len(sources) != 1 or ends[0].in_width != down.width:
        return None
    ports = {
        "input": PortNode(sources.pop()),
        "activation": PortNode(down.source),
        "output": PortNode(down.node, down),
    }
    gated = len(ends) == 2
    if gated:  # the gate is the one that goes through the nonlinearity
        ends = sorted(ends, key=lambda e: not _bends(e.node, down.source, root))
    for name, end in zip(("gate", "up") if gated else ("up",), ends, strict=False):
        ports[name] = PortNode(end.node, end)
    nodes = [down.node, *(end.node for end in ends), *between]
    where = down.module or str(down.node.meta["owner"])
    return Match("ffn", where, down.node, ports, nodes)


def _follows(end: Projection, sources: set[fx.Node], root: nn.Module) -> bool:
    """Is what a projection reads projected itself, from one of these?"""
    first = projection(origin(end.source), root)
    return first is not None and origin(first.source) in sources


def experts_pattern(node: fx.Node, root: nn.Module) -> Match | None:
    """A block of experts: a module whose weights are stacked, (experts, in, out), as one FFN."""
    if node.op != "call_module":
        return None
    module, out = root.get_submodule(str(node.target)), value(node)
    if isinstance(module, nn.modules.conv._ConvNd) or not stacks_weights(module):
        return None
    source = next((n for n in inputs(node) if is_activation(n)), None)
    if source is None or value(source).numel() != out.numel():
        return None
    if value(source).shape[-1] != out.shape[-1]:
        return None
    ports = {"input": PortNode(source), "output": PortNode(node)}
    return Match("ffn", str(node.target), node, ports, [node])


def _bends(start: fx.Node, end: fx.Node, root: nn.Module) -> bool:
    return any(_nonlinear(node, root) for node in flow(start, end)[1:])


def _nonlinear(node: fx.Node, root: nn.Module) -> bool:
    if op_name(node) in ACTIVATIONS:
        return True
    if node.op != "call_module":
        return False
    module = root.get_submodule(str(node.target))
    if isinstance(module, (nn.Identity, nn.Dropout, nn.Flatten, nn.Unflatten)):
        return False
    return not any(True for _ in module.parameters()) or _elementwise(module, node)


def _elementwise(module: nn.Module, node: fx.Node) -> bool:
    """Does each output depend on one input only? (A norm has parameters too.)"""
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
    """Is the output of an FFN added to something? (To be asked of a flat graph.)"""
    start = match.ports["output"].node
    onward = walk_on(start, lambda n: op_name(n) in _RESIDUAL_OPS and not projection(n, root))
    return any(op_name(n) in ("add", "iadd", "radd") or _adds_inside(n) for n in onward)


def _adds_inside(node: fx.Node) -> bool:
    """Does a module take in two activations of one shape (one of them is the residual stream)?"""
    shapes = [value(n).shape for n in node.all_input_nodes if is_activation(n)]
    return node.op == "call_module" and len(shapes) > 1 and shapes[0] == shapes[1]
