"""Projections: where a graph has a learned map of the last axis, however it is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx, nn

from surgery.patterns.dataflow import (
    from_parameters,
    handed_on,
    inputs,
    is_parameter,
    op_name,
    value,
)


@dataclass(frozen=True)
class Projection:
    """A learned map of the last axis: a linear layer in any guise.

    Attributes:
        node, source: what it gives and what it reads.
        in_width, width: number of features of each.
        in_axes, axes: on how many last axes they lie; (n, d) instead of one in some einsums.
        module: the module that does it; empty if the weight is used directly.
    """

    node: fx.Node
    source: fx.Node
    in_width: int
    width: int
    in_axes: int = 1
    axes: int = 1
    module: str = ""


def projection(node: fx.Node, root: nn.Module) -> Projection | None:
    """The projection that a node computes, or None."""
    out = value(node)
    if not isinstance(out, Tensor) or not out.is_floating_point() or out.dim() < 2:
        return None
    caller = caller_of(node)
    if caller.op == "call_module":
        module = root.get_submodule(str(caller.target))
        source = next((n for n in caller.all_input_nodes if _floats(n)), None)
        if source is None or not value(source).dim():
            return None
        if not _maps_last_axis(module, value(source).shape[-1], out.shape[-1]):
            return None
        return _as_projection(node, source, str(caller.target))
    found = _functional(node)
    if found is None:
        return None
    axes = _einsum_axes(node, found) if op_name(node) == "einsum" else (1, 1)
    return _as_projection(node, found, "", *axes)


def _functional(node: fx.Node) -> fx.Node | None:
    """What a product with a weight reads, where a forward computes it itself."""
    tensors = [n for n in node.all_input_nodes if isinstance(value(n), Tensor)]
    name = op_name(node)
    if name == "addmm":  # (bias, x, weight)
        tensors = tensors[1:]
    if name not in ("linear", "matmul", "addmm", "einsum") or len(tensors) < 2:
        return None
    first, second = tensors[:2]
    if name in ("matmul", "einsum") and is_weight(first) and not is_weight(second):
        first, second = second, first
    return first if is_weight(second) and value(second).dim() >= 2 and _floats(first) else None


def is_weight(node: fx.Node) -> bool:
    """A parameter, or something made of parameters alone."""
    return is_parameter(node) or from_parameters(node)


def _floats(node: fx.Node) -> bool:
    return isinstance(value(node), Tensor) and bool(value(node).is_floating_point())


def bias_of(made: Projection, root: nn.Module) -> str | fx.Node | None:
    """The bias that a projection adds: a parameter's name, or the node that has it."""
    if made.module:
        bias = getattr(root.get_submodule(made.module), "bias", None)
        plain = isinstance(bias, Tensor) and bias.shape == (made.width,)
        return f"{made.module}.bias" if plain else None
    name, args = op_name(made.node), made.node.args
    found: object = None
    if name == "linear":
        found = args[2] if len(args) > 2 else made.node.kwargs.get("bias")
    elif name == "addmm":
        found = args[0]
    return found if isinstance(found, fx.Node) and is_weight(found) else None


def weight_of(made: Projection, root: nn.Module) -> tuple[str, bool]:
    """The name of a projection's matrix, and whether it is (out, in).

    The name is empty unless the projection is ``x W + b`` with one matrix of floating point: the
    values that it was seen with are the proof.
    """
    if made.module:
        own = root.get_submodule(made.module).named_parameters(recurse=False)
        names = [f"{made.module}.{name}" for name, p in own if p.dim() == 2]
    else:
        weights = [n for n in made.node.all_input_nodes if n.op == "get_attr"]
        names = [str(n.target) for n in weights if value(n).dim() == 2]
    widths = (made.in_width, made.width)
    if len(names) != 1 or made.in_axes != 1 or made.axes != 1:
        return "", False
    weight = _attribute(root, names[0])
    fits = [t for t in (False, True) if tuple(weight.shape)[:: -1 if t else 1] == widths]
    if not weight.is_floating_point() or not fits:
        return "", False
    x, y = value(made.source), value(made.node)
    if x.is_meta:  # no values, but it may be clear from the shapes
        return (names[0], fits[0]) if len(fits) == 1 else ("", False)
    if weight.device != x.device or not x.numel():
        return "", False
    bias = bias_of(made, root)
    shift = _attribute(root, bias) if isinstance(bias, str) else value(bias) if bias else None
    bound = 0.05 if y.dtype.itemsize == 2 else 5e-3  # bfloat16, TF32
    x, y = x.detach().flatten(0, -2)[0].double(), y.detach().flatten(0, -2)[0].double()
    some = slice(0, 16)  # features are enough to tell
    added = 0.0 if shift is None else shift.detach()[some].double()
    for transposed in fits:
        matrix = (weight[some].T if transposed else weight[:, some]).detach().double()
        gap = (x @ matrix + added - y[some]).abs().max()
        if gap <= bound * y[some].abs().max().clamp(min=1e-6):
            return names[0], transposed
    return "", False


def _attribute(root: nn.Module, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    found: Tensor = getattr(root.get_submodule(owner), last)
    return found


def reads_now(call: fx.Node) -> fx.Node:
    """What a projection's call reads, as edits have left it."""
    return next(n for n in call.all_input_nodes if _floats(n) and not is_weight(n))


def caller_of(node: fx.Node) -> fx.Node:
    """The module call that a node is the first output of; the node itself if it is none."""
    if op_name(node) == "getitem" and node.args[1] == 0:
        base = node.args[0]
        if isinstance(base, fx.Node) and base.op == "call_module":
            return base
    return node


def _as_projection(
    node: fx.Node, source: fx.Node | None, module: str, in_axes: int = 1, axes: int = 1
) -> Projection | None:
    if source is None or not in_axes or not axes:
        return None
    given, made = value(source).shape, value(node).shape
    if given[:-in_axes] != made[:-axes]:
        return None
    widths = math.prod(given[-in_axes:]), math.prod(made[-axes:])
    return Projection(node, source, *widths, in_axes, axes, module)


def einsum_letters(node: fx.Node) -> tuple[list[str], str]:
    """The letters of an einsum: of each operand, and of the result; empty if not plain."""
    equation = node.args[0] if node.args else ""
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return [], ""
    given, made = equation.replace(" ", "").split("->")
    return given.split(","), made


def _einsum_axes(node: fx.Node, source: fx.Node) -> tuple[int, int]:
    """How many last axes an einsum contracts, and how many it makes; 0 if it moves others."""
    given, made = einsum_letters(node)
    operands = node.all_input_nodes
    if source not in operands or len(operands) != len(given):
        return 1, 1
    letters = given[operands.index(source)]
    kept = [x for x in letters if x in made]
    lost, new = len(letters) - len(kept), len(made) - len(kept)
    plain = letters.startswith("".join(kept)) and made.startswith("".join(kept))
    return (lost, new) if plain else (0, 0)


def _maps_last_axis(module: nn.Module, in_width: int, width: int) -> bool:
    """Does a childless module own a matrix (in, out), or a chain of them? (No convolution.)

    A quantised matrix may be packed in any shape; then a module without convolution will do.
    """
    if any(True for _ in module.children()) or isinstance(module, nn.modules.conv._ConvNd):
        return False
    if stacks_weights(module):
        return False
    own = [*module.parameters(), *module.buffers()]
    if any(not t.is_floating_point() and t.dim() > 1 for t in own):
        return True
    matrices = [t.shape for t in own if t.dim() == 2]
    if len(matrices) == 1:
        return sorted(matrices[0]) == sorted((in_width, width))
    return any(in_width in m for m in matrices) and any(width in m for m in matrices)


def stacks_weights(module: nn.Module) -> bool:
    """Does a module own weights (experts, in, out), as a block of experts does?"""
    return any(p.dim() == 3 and p.shape[0] > 1 for p in module.parameters(recurse=False))


def walk_back(
    start: fx.Node, root: nn.Module, passes: Callable[[fx.Node], bool]
) -> tuple[list[Projection], list[fx.Node], list[fx.Node]]:
    """Walk from ``start`` against the dataflow, through nodes that ``passes`` allows.

    Returns:
        the projections that it ended at (nearest first), the nodes in between, and the tensors
        that it ended at which are neither projections nor parameters.
    """
    ends: list[Projection] = []
    between: list[fx.Node] = []
    loose: list[fx.Node] = []
    queue, seen = [start], {start}
    while queue:
        node = queue.pop(0)
        found = projection(node, root)
        if found is not None:
            ends.append(found)
        elif node.op == "get_attr":
            continue
        elif node.op == "placeholder" or not (passes(node) or handed_on(node)):
            loose.append(node)
        else:
            between.append(node)
            for origin in inputs(node):
                if origin not in seen:
                    seen.add(origin)
                    queue.append(origin)
    return ends, between, loose
