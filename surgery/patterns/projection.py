"""Recognise a learned linear map of each token in a graph, however it is written.

A projection is a whole module with one matrix (``nn.Linear``, a quantised layer, one with its own
low-rank update), a product with a weight (``linear``, ``matmul``, ``addmm`` or ``einsum``), or
a convolution of one position, whose features are axis 1 instead of the last.
Classes and names play no role. A module's matrix is recognised by its shape; whether the module
computes ``x W + b`` and nothing else is checked on the example values (:func:`weight_of`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.interop import base_children, own_part
from surgery.patterns.dataflow import (
    forwarded,
    from_parameters,
    inputs,
    is_parameter,
    op_name,
    value,
)
from surgery.plugin import is_leaf


@dataclass(frozen=True)
class Projection:
    """A learned map of the features of each token, such as a linear layer.

    Attributes:
        node, source: the nodes of its output and of its input.
        in_width, width: the number of features of the input and of the output.
        in_axes, axes: how many last axes hold the features of the input and of the output; an
            einsum may have two, (heads, d).
        module: the path of the module that computes it; empty if the forward uses the weight
            itself.
        channels_first: the features of input and output are axis 1, (B, D, h, w), as a
            convolution has them.
        strides: the convolution reads every so manyth position of each axis; empty if every one.
    """

    node: fx.Node
    source: fx.Node
    in_width: int
    width: int
    in_axes: int = 1
    axes: int = 1
    module: str = ""
    channels_first: bool = False
    strides: tuple[int, ...] = ()

    @property
    def tokens(self) -> torch.Size:
        """The axes of the output that are not features, in order."""
        shape: torch.Size = features_last(value(self.node), self.channels_first).shape
        return shape[: -self.axes]


def features_last(x: Tensor, channels_first: bool) -> Tensor:
    """Return ``x`` with its features as the last axis: (B, D, h, w) -> (B, h, w, D)."""
    return x.movedim(1, -1) if channels_first else x


def projection(node: fx.Node, root: nn.Module) -> Projection | None:
    """Return the projection whose output is ``node``, or None."""
    out = value(node)
    if not isinstance(out, Tensor) or not out.is_floating_point() or out.dim() < 2:
        return None
    caller = module_call_of(node)
    if caller.op == "call_module":
        module = root.get_submodule(str(caller.target))
        source = next((n for n in caller.all_input_nodes if _is_float(n)), None)
        if source is None or not value(source).dim():
            return None
        if is_convolution(module):
            weight, stride = module.weight, module.stride
            return _of_convolution(node, source, weight, stride, str(caller.target))
        whole = is_whole(module, str(caller.target))
        if not whole or not _maps_last_axis(module, value(source).shape[-1], out.shape[-1]):
            return None
        return _as_projection(node, source, str(caller.target))
    if op_name(node) in ("conv1d", "conv2d", "conv3d"):
        return _of_functional_convolution(node)
    found = _input_of_product(node)
    if found is None:
        return None
    axes = _einsum_axes(node, found) if op_name(node) == "einsum" else (1, 1)
    return _as_projection(node, found, "", *axes)


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution of any kind."""
    return isinstance(module, nn.modules.conv._ConvNd)


def _of_convolution(
    node: fx.Node, source: fx.Node, weight: Any, stride: Any, path: str
) -> Projection | None:
    """Return the projection that a convolution of one position is; None for any other.

    A depthwise one, with a weight (D, 1, 1, 1), maps no features to others.
    """
    x, out = value(source).shape, value(node).shape
    if any(size != 1 for size in weight.shape[2:]) or len(x) != weight.dim():
        return None
    strides = tuple(stride) if isinstance(stride, (tuple, list)) else (stride,) * (len(x) - 2)
    if tuple(-(-n // s) for n, s in zip(x[2:], strides, strict=True)) != tuple(out[2:]):
        return None
    if weight.shape[1] == 1 and x[1] > 1:
        return None
    strides = strides if set(strides) != {1} else ()
    return Projection(node, source, x[1], out[1], module=path, channels_first=True, strides=strides)


def every_position(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return the positions of x (B, D, h, w) that a convolution with these strides reads."""
    for axis, stride in enumerate(strides, 2):
        x = x[(slice(None),) * axis + (slice(None, None, stride),)]
    return x


def _of_functional_convolution(node: fx.Node) -> Projection | None:
    """Return the projection of a call such as ``F.conv2d(x, weight, bias, stride)``."""
    given = dict(zip(("input", "weight", "bias", "stride"), node.args, strict=False))
    given |= dict(node.kwargs)
    source, weight = given.get("input"), given.get("weight")
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node) or not is_weight(weight):
        return None
    stride = given.get("stride", 1)
    return _of_convolution(node, source, value(weight), stride, "")


def _input_of_product(node: fx.Node) -> fx.Node | None:
    """Return the input of a product with a weight, or None if the node is another operation."""
    tensors = [n for n in node.all_input_nodes if isinstance(value(n), Tensor)]
    name = op_name(node)
    if name == "addmm":  # (bias, x, weight)
        tensors = tensors[1:]
    if name not in ("linear", "matmul", "addmm", "einsum") or len(tensors) < 2:
        return None
    first, second = tensors[:2]
    if name in ("matmul", "einsum") and is_weight(first) and not is_weight(second):
        first, second = second, first
    return first if is_weight(second) and value(second).dim() >= 2 and _is_float(first) else None


def is_weight(node: fx.Node) -> bool:
    """Whether a node is a parameter, or computed from parameters alone."""
    return is_parameter(node) or from_parameters(node)


def _is_float(node: fx.Node) -> bool:
    """Whether the value of a node is a floating-point tensor."""
    return isinstance(value(node), Tensor) and bool(value(node).is_floating_point())


def input_of_call(call: fx.Node) -> fx.Node:
    """Return the input of a projection's call, as earlier edits have left it."""
    return next(n for n in call.all_input_nodes if _is_float(n) and not is_weight(n))


def module_call_of(node: fx.Node) -> fx.Node:
    """Return the module call whose first output is ``node``; otherwise ``node`` itself."""
    if op_name(node) == "getitem" and node.args[1] == 0:
        base = node.args[0]
        if isinstance(base, fx.Node) and base.op == "call_module":
            return base
    return node


def _as_projection(
    node: fx.Node, source: fx.Node | None, module: str, in_axes: int = 1, axes: int = 1
) -> Projection | None:
    """Return the projection from ``source`` to ``node``, None if their other axes differ."""
    if source is None or not in_axes or not axes:
        return None
    in_shape, out_shape = value(source).shape, value(node).shape
    if in_shape[:-in_axes] != out_shape[:-axes]:
        return None
    widths = math.prod(in_shape[-in_axes:]), math.prod(out_shape[-axes:])
    return Projection(node, source, *widths, in_axes, axes, module)


def einsum_letters(node: fx.Node) -> tuple[list[str], str]:
    """Return the letters of an einsum's operands and of its result.

    Both are empty if the equation has an ellipsis, has no arrow, or is not a string.
    """
    equation = node.args[0] if node.args else ""
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return [], ""
    operand_letters, result = equation.replace(" ", "").split("->")
    return operand_letters.split(","), result


def _einsum_axes(node: fx.Node, source: fx.Node) -> tuple[int, int]:
    """Return how many last axes of its source an einsum contracts, and how many it makes.

    Both are 0 unless the axes that it keeps come first, in one order, on both sides.
    """
    operand_letters, result = einsum_letters(node)
    operands = node.all_input_nodes
    if source not in operands or len(operands) != len(operand_letters):
        return 1, 1
    letters = operand_letters[operands.index(source)]
    kept = [x for x in letters if x in result]
    lost, new = len(letters) - len(kept), len(result) - len(kept)
    plain = letters.startswith("".join(kept)) and result.startswith("".join(kept))
    return (lost, new) if plain else (0, 0)


def _maps_last_axis(module: nn.Module, in_width: int, width: int) -> bool:
    """Whether a whole module owns a matrix between two widths, and maps each token by itself.

    Recurrent layers mix tokens; convolutions are told by :func:`_of_convolution`.

    Several matrices count if one has the input's width and one the output's: a low-rank pair. A
    quantised matrix is an integer tensor packed in any shape, so its shape is not compared.
    """
    mixes = is_convolution(module) or isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    if mixes or stacks_weights(module):
        return False
    if packs_weights(module):
        return True
    own = [t for t in (*module.parameters(), *module.buffers()) if t.dim() == 2]
    matrices = [t.shape for t in own]
    if len(own) == 1:
        mine = own_part(own[0]).shape  # as a process of tensor parallelism computes with it
        return sorted((in_width, width)) in (sorted(matrices[0]), sorted(mine))
    return any(in_width in m for m in matrices) and any(width in m for m in matrices)


def is_whole(module: nn.Module, path: str) -> bool:
    """Whether no node is looked for inside a module: it has no children, or is a packed layer.

    A packed layer with children is known by the ``is_leaf`` hook.
    """
    return not base_children(module) or bool(is_leaf(module, path) and packs_weights(module))


def packs_weights(module: nn.Module) -> bool:
    """Whether a module or a child of it owns a matrix of whole numbers, as a quantised layer."""
    own = (*module.parameters(), *module.buffers())
    return any(not t.is_floating_point() and t.dtype != torch.bool and t.dim() > 1 for t in own)


def stacks_weights(module: nn.Module) -> bool:
    """Whether a module owns a stack of weights (experts, in, out), as a block of experts does."""
    return any(p.dim() == 3 and p.shape[0] > 1 for p in module.parameters(recurse=False))


def walk_back(
    start: fx.Node,
    root: nn.Module,
    passes: Callable[[fx.Node], bool],
    enough: Callable[[list[Projection], list[fx.Node]], bool] = lambda ends, others: False,
) -> tuple[list[Projection], list[fx.Node], list[fx.Node]]:
    """Walk from ``start`` against the dataflow, breadth first, while ``passes`` is true.

    A branch of the walk ends at a projection, a parameter, or a node that does not pass.

    Args:
        enough: whether the walk may stop early, by the projections and other nodes at which it has
            ended so far. Against the residual stream it would pass every earlier layer.

    Returns:
        the projections at which it ended (nearest first), the nodes in between, and the other nodes
        at which it ended, parameters excepted.
    """
    ends: list[Projection] = []
    between: list[fx.Node] = []
    others: list[fx.Node] = []
    queue, seen = [start], {start}
    while queue and not enough(ends, others):
        node = queue.pop(0)
        found = projection(node, root)
        if found is not None:
            ends.append(found)
        elif node.op == "get_attr":
            continue
        elif node.op == "placeholder" or not (passes(node) or forwarded(node)):
            others.append(node)
        else:
            between.append(node)
            for before in inputs(node):
                if before not in seen:
                    seen.add(before)
                    queue.append(before)
    return ends, between, others
