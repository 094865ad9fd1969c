"""Walks over the dataflow of a captured graph: what an operation is, and what lies behind it.

Every function here reads nodes that carry ``meta["value"]``; none changes a graph. Operations are
known by what torch calls them, modules by what they own; names of a model's parts play no role.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from surgery.border import after, before

# Rearrangements: every element of the result is an element of the input.
VIEWS = frozenset(
    (
        "view reshape transpose permute contiguous split chunk unbind getitem narrow "
        "select flatten unflatten squeeze unsqueeze movedim swapaxes swapdims T mT "
        "tensor_split split_with_sizes view_as reshape_as expand expand_as to type float "
        "half bfloat16 type_as clone t detach unsafe_chunk unsafe_split requires_grad_ "
        "index_select roll flip"
    ).split()
)
PRODUCTS = frozenset(["matmul", "bmm", "baddbmm", "einsum"])
ACTIVATIONS = frozenset(
    (
        "relu gelu silu sigmoid tanh erf elu leaky_relu softplus hardswish mish relu6 "
        "hardsigmoid selu celu glu exp square pow logsigmoid hardtanh swiglu"
    ).split()
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


def from_parameters(node: fx.Node) -> bool:
    """Is this computed from parameters and numbers alone (``1 + weight``)?"""
    ends = [n for n in ancestors(node) if not inputs(n)]
    return all(n.op == "get_attr" for n in ends)


def is_row_maximum(node: Any) -> bool:
    """Is this the maximum over the last axis, as ``max(-1, keepdim=True).values`` or ``amax``?"""
    while isinstance(node, fx.Node) and op_name(node) in (*VIEWS, "values"):
        node = node.args[0]
    return isinstance(node, fx.Node) and op_name(node) in ("max", "amax")


def inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors flow into a node, in order.

    An item of a tuple is followed to what it was made from, where the tuple only hands it on: a
    cache's ``update(key, value)``, or the arguments and outputs at the border of a module.
    """
    origin = handed_on(node)
    if origin is not None:
        return [origin]
    return [n for n in node.all_input_nodes if holds_tensors(value(n))]


def handed_on(node: fx.Node) -> fx.Node | None:
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
        content = [n for n in base.args[1:] if isinstance(n, fx.Node) and holds_tensors(value(n))]
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
        if _maps_last_axis(module, out.shape[-1]):
            source = next((n for n in node.all_input_nodes if is_activation(n)), None)
    elif op_name(node) in ("linear", "matmul", "addmm", "einsum"):
        operands = [n for n in node.all_input_nodes if isinstance(value(n), Tensor)]
        weights = [n for n in operands if is_parameter(n) and value(n).dim() >= 2]
        moving = [n for n in operands if is_activation(n)]
        source = moving[0] if weights and len(moving) == 1 else None
    if source is None or value(source).shape[:-1] != out.shape[:-1]:
        return None
    return Projection(node, source, value(source).shape[-1], out.shape[-1])


def _maps_last_axis(module: nn.Module, width: int) -> bool:
    """Does a childless module own a matrix, one side of which is ``width``? (No convolution.)

    A quantised matrix may be packed in any shape; then a module without convolution will do.
    """
    if any(True for _ in module.children()) or isinstance(module, nn.modules.conv._ConvNd):
        return False
    if stacks_weights(module):
        return False
    own = [*module.parameters(), *module.buffers()]
    packed = any(not t.is_floating_point() for t in own)
    matrices = [t for t in own if t.dim() == 2 or (packed and t.dim() > 2)]
    return any(packed or width in t.shape for t in matrices)


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
                if passes(user) or handed_on(user):
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


def holds_tensors(v: Any) -> bool:
    return isinstance(v, Tensor) or (
        isinstance(v, (tuple, list)) and any(isinstance(x, Tensor) for x in v)
    )
