"""Walks over the dataflow of a captured graph: what an operation is, and what lies behind it.

Every function here reads nodes that carry ``meta["value"]``; none changes a graph. Operations are
known by what torch calls them, modules by what they own; names of a model's parts play no role.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.capture import after, before

# Rearrangements: every element of the result is an element of the input.
VIEWS = frozenset(
    "view reshape transpose permute contiguous split chunk unbind getitem narrow select flatten "
    "unflatten squeeze unsqueeze movedim swapaxes swapdims T mT tensor_split split_with_sizes "
    "view_as reshape_as expand expand_as to type float half bfloat16 type_as clone t detach "
    "unsafe_chunk unsafe_split requires_grad_ index_select roll flip".split()
)
PRODUCTS = frozenset("matmul bmm baddbmm einsum".split())
ACTIVATIONS = frozenset(
    "relu gelu silu sigmoid tanh erf elu leaky_relu softplus hardswish mish relu6 hardsigmoid selu "
    "celu glu exp square pow logsigmoid hardtanh swiglu".split()
)


def op_name(node: fx.Node) -> str:
    """What torch calls the operation of a node: ``matmul`` for each way of writing one."""
    if node.op == "call_module":
        return "module"
    if node.op in ("placeholder", "get_attr", "output"):
        return node.op
    target = node.target
    if target is getattr and isinstance(node.args[1], str):
        return node.args[1]
    name = target if isinstance(target, str) else getattr(target, "__name__", "?")
    name = name.strip("_")
    return "matmul" if name == "rmatmul" else name


def value(node: Any) -> Any:
    """The example value of a node."""
    return node.meta.get("value") if isinstance(node, fx.Node) else None


def is_activation(node: Any) -> bool:
    """Is this a floating-point tensor that is not a parameter?"""
    v = value(node)
    return isinstance(v, Tensor) and v.is_floating_point() and not is_parameter(node)


def is_parameter(node: Any) -> bool:
    """A parameter or buffer, maybe seen through a transposition or a cast."""
    while isinstance(node, fx.Node) and op_name(node) in VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return isinstance(node, fx.Node) and node.op == "get_attr"


def inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors flow into a node, in order.

    An item of a tuple is followed to what it was made from, where the tuple only hands it on: a
    cache's ``update(key, value)``, or the arguments and outputs at the border of a module.
    """
    origin = _handed_on(node)
    if origin is not None:
        return [origin]
    return [n for n in node.all_input_nodes if _tensors(value(n))]


def _handed_on(node: fx.Node) -> fx.Node | None:
    path: list[Any] = []
    base: Any = node
    while op_name(base) == "getitem" and isinstance(base.args[0], fx.Node):
        path.insert(0, base.args[1])
        base = base.args[0]
    content: Any
    if base.target is before:
        content = base.args[1:]
    elif base.target is after:
        content = base.args[2]
    elif op_name(base) == "update" and len(path) == 1:
        content = [n for n in base.args[1:] if isinstance(n, fx.Node) and _tensors(value(n))]
    else:
        return None
    for index in path:
        try:
            content = content[index]
        except (KeyError, IndexError, TypeError):
            return None
    return content if isinstance(content, fx.Node) and content is not node else None


@dataclass(frozen=True)
class Projection:
    """A learned map of the last axis: a linear layer in any guise."""

    node: fx.Node
    source: fx.Node
    in_width: int
    width: int


def projection(node: fx.Node, root: nn.Module) -> Projection | None:
    """The projection that a node computes, or None."""
    out = value(node)
    if not isinstance(out, Tensor) or not out.is_floating_point() or out.dim() < 2:
        return None
    source: Any = None
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if any(p.dim() >= 2 for p in _weights(module)) and not any(True for _ in module.children()):
            source = next((n for n in node.all_input_nodes if is_activation(n)), None)
    elif op_name(node) in ("linear", "matmul", "addmm", "einsum"):
        operands = [n for n in node.all_input_nodes if isinstance(value(n), Tensor)]
        weights = [n for n in operands if is_parameter(n) and value(n).dim() >= 2]
        moving = [n for n in operands if is_activation(n)]
        source = moving[0] if weights and len(moving) == 1 else None
    if source is None or value(source).shape[:-1] != out.shape[:-1]:
        return None
    return Projection(node, source, value(source).shape[-1], out.shape[-1])


def _weights(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


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
        elif node.op == "placeholder" or not (passes(node) or _handed_on(node)):
            loose.append(node)
        else:
            between.append(node)
            for origin in inputs(node):
                if origin not in seen:
                    seen.add(origin)
                    queue.append(origin)
    return ends, between, loose


def walk_on(start: fx.Node, passes: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The nodes that ``start`` flows into, breadth first; it goes on behind those that pass."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in start.graph.nodes:
        for origin in inputs(node):
            readers.setdefault(origin, []).append(node)
    reached: list[fx.Node] = []
    queue, seen = [start], {start}
    while queue:
        for user in readers.get(queue.pop(0), ()):
            if user not in seen:
                seen.add(user)
                reached.append(user)
                if passes(user) or _handed_on(user):
                    queue.append(user)
    return reached


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Every node whose tensor flows into ``node``, itself included. Sizes are no flow."""
    found, stack = {node}, [node]
    while stack:
        for origin in inputs(stack.pop()):
            if origin not in found:
                found.add(origin)
                stack.append(origin)
    return found


def flow(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes through which ``start`` flows into ``end``, both included, in graph order."""
    behind = ancestors(end)
    reached = {start}
    for node in start.graph.nodes:
        if node in behind and any(n in reached for n in inputs(node)):
            reached.add(node)
    return [node for node in start.graph.nodes if node in reached]


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
        origin = _handed_on(node)
        if origin is not None:
            labels[node] = labels[origin]
        elif op_name(node) in VIEWS:
            labels[node] = _relabel(node, labels)
        if labels.get(node) is None:
            labels.pop(node, None)
            sources = [n for n in inputs(node) if isinstance(labels.get(n), Tensor)]
            reached.update(x for n in sources for x in labels[n].unique().tolist())
    if isinstance(labels.get(end), Tensor):
        reached.update(labels[end].unique().tolist())
    chosen = sorted(reached) or list(range(width))
    if len(chosen) == width:
        return start, chosen
    shape = (*value(start).shape[:-1], len(chosen))
    for node, label in labels.items():
        if isinstance(label, Tensor) and tuple(label.shape) == shape:
            if label.unique().tolist() == chosen:
                return node, chosen
    return start, chosen


def _relabel(node: fx.Node, labels: dict[fx.Node, Any]) -> Any:
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
        if furthest <= i:
            waist = node
        furthest = max([furthest, *(position[u] for u in node.users if u in position)])
    shape, heads = value(waist).shape, value(end).shape
    return waist if len(shape) == len(heads) and shape[-1] == heads[-1] else end


def _mixes(node: fx.Node, position: dict[fx.Node, int]) -> bool:
    others = [n for n in node.all_input_nodes if n not in position and is_activation(n)]
    return op_name(node) in ("mul", "einsum", "where", "matmul", "addcmul") and bool(others)


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
        if number is None and len(tensors) == 2 and not tensors[1].is_meta and tensors[1].dim() == 0:
            number = tensors[1].item()
        if number is None or math.isinf(number):
            continue
        if op_name(node) in ("mul", "rmul", "imul"):
            scale *= number
        elif op_name(node) in ("div", "truediv", "itruediv"):
            scale /= number
    return scale


def _tensors(v: Any) -> bool:
    return isinstance(v, Tensor) or (
        isinstance(v, (tuple, list)) and any(isinstance(x, Tensor) for x in v)
    )
