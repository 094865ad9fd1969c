"""Walks over the dataflow of a captured graph: what an operation is, and what lies behind it.

Every function here reads nodes that carry ``meta["value"]``; none changes a graph. Operations are
known by what torch calls them, modules by what they own; names of a model's parts play no role.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx

from surgery.capture import run_forward_hooks, run_pre_hooks

# Rearrangements: every element of the result is an element of the input.
VIEWS = frozenset(
    (
        "view reshape transpose permute contiguous split chunk unbind getitem narrow "
        "select flatten unflatten squeeze unsqueeze movedim swapaxes swapdims T mT "
        "tensor_split split_with_sizes view_as reshape_as expand expand_as to type float "
        "half bfloat16 type_as clone t detach unsafe_chunk unsafe_split requires_grad_ "
        "index_select roll flip repeat repeat_interleave unfold"
    ).split()
)


ARITHMETIC = frozenset(
    "add iadd radd sub rsub mul imul rmul div truediv itruediv neg where cat dropout".split()
)


ELEMENTWISE = ARITHMETIC | {"module", "layer_norm", "rms_norm", "clamp", "tanh"}


_ASSIGNS = (operator.setitem, Tensor.__setitem__)


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
    """Is this computed from parameters and numbers alone (``1 + weight``)?

    So is what a module gives that is called with nothing at all: a parametrization.
    """
    if node.op == "placeholder":
        return False
    ends = [n for n in ancestors(node) if not inputs(n)]
    return all(n.op == "get_attr" or _parametrization(n) for n in ends)


def _parametrization(node: fx.Node) -> bool:
    return node.op == "call_module" and not node.args and not node.kwargs


def is_row_maximum(node: Any) -> bool:
    """Is this the maximum over the last axis, as ``max(-1, keepdim=True).values`` or ``amax``?"""
    while isinstance(node, fx.Node) and op_name(node) in (*VIEWS, "values"):
        node = node.args[0]
    return isinstance(node, fx.Node) and op_name(node) in ("max", "amax")


def normalises(out: Any) -> bool:
    """Do the rows of ``out`` sum to one, each (or to nothing, where all is masked)?"""
    if type(out) is not Tensor or not out.is_floating_point() or out.is_meta or out.dim() < 3:
        return False
    total = out.sum(-1)
    return bool((out >= 0).all() and ((total - 1).abs().minimum(total.abs()) < 1e-3).all())


def inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors flow into a node, in order.

    An item of a tuple is followed to what it was made from, where the tuple only hands it on: a
    cache's ``update(key, value)``, or the arguments and outputs at the border of a module.
    """
    origin = handed_on(node)
    if origin is not None:
        return [origin]
    found = [n for n in node.all_input_nodes if holds_tensors(value(n))]
    return found + [new for n in found for new in _written(n, node)]


def _written(target: fx.Node, reader: fx.Node) -> list[fx.Node]:
    """What has been assigned to parts of a tensor (``x[a] = y``) before ``reader`` reads it."""
    writes = [u for u in target.users if u.target in _ASSIGNS and u.args[0] is target]
    return [u.args[2] for u in writes if u < reader and isinstance(u.args[2], fx.Node)]


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that ``node`` flows into: the other way round than :func:`inputs`."""
    stack, seen = list(node.users), set(node.users)
    while stack:
        user = stack.pop(0)
        if node in inputs(user):
            yield user
        if user.target in _ASSIGNS:
            stack += [u for u in user.args[0].users if u not in seen and user < u]  # type: ignore[union-attr]
        elif not isinstance(value(user), Tensor):  # a tuple that hands it on
            stack += [u for u in user.users if u not in seen]
        seen.update(stack)


def handed_on(node: fx.Node) -> fx.Node | None:
    path: list[Any] = []
    base: Any = node
    while isinstance(base, fx.Node) and (step := _step(base)) is not None:
        path.insert(0, step)
        base = base.args[0]
    content: Any
    if base.target is run_pre_hooks:
        content = base.args[1:]
    elif base.target is run_forward_hooks:
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


def _step(node: fx.Node) -> Any:
    """Which item of a tuple a node takes, by number or by name; None if it takes none."""
    if op_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
        return node.args[1]
    fields = getattr(value(node.args[0]), "_fields", ()) if node.target is getattr else ()
    return fields.index(node.args[1]) if node.args[1:] and node.args[1] in fields else None


def origin(node: fx.Node) -> fx.Node:
    """Where a value comes from, through the borders of modules."""
    before_it = handed_on(node)
    return node if before_it is None else origin(before_it)


def walk_on(start: fx.Node, passes: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The nodes that ``start`` flows into, breadth first; it goes on behind those that pass."""
    reached: list[fx.Node] = []
    queue, seen = [start], {start}
    while queue:
        for user in readers(queue.pop(0)):
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
    behind, stack = {end}, [end]
    while stack:
        fresh = [n for n in inputs(stack.pop()) if n not in behind and start < n]
        behind.update(fresh)
        stack += fresh
    reached = {start: None}  # in order
    for node in sorted(behind - {start}):
        if any(n in reached for n in inputs(node)):
            reached[node] = None
    return list(reached)


def holds_tensors(v: Any) -> bool:
    return isinstance(v, Tensor) or (
        isinstance(v, (tuple, list)) and any(isinstance(x, Tensor) for x in v)
    )
