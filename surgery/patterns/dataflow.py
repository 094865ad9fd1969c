"""Walk over the dataflow of a captured graph, and classify its operations.

Every function here reads nodes that carry ``meta["value"]``; none changes a graph. An operation is
known by its name in torch, and a module by the parameters that it owns. The names of a model's
parts play no role.

Dataflow is not the same as the arguments of nodes. A capture inlines modules, so values pass
through tuples (the hooks at a module's border, the ``update`` of a cache) that hold other values
too. :func:`inputs` and :func:`readers` look through such tuples item by item; every walk is built
on the two. Sizes and other numbers are not dataflow.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn

from surgery.capture import make_record, run_forward_hooks, run_pre_hooks

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


# Targets of ``x[a] = y``, which write into a tensor that other nodes read.
_ASSIGNS = (operator.setitem, Tensor.__setitem__)


# The first argument becomes like the second, of which only shape, dtype or device is read.
_LIKE_ANOTHER = frozenset("type_as view_as expand_as reshape_as to".split())


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


PRODUCTS = frozenset(["matmul", "bmm", "baddbmm", "einsum"])


ACTIVATIONS = frozenset(
    (
        "relu gelu silu sigmoid tanh erf elu leaky_relu softplus hardswish mish relu6 "
        "hardsigmoid selu celu glu exp square pow logsigmoid hardtanh swiglu"
    ).split()
)


def op_name(node: fx.Node) -> str:
    """Return torch's name of a node's operation, such as ``matmul`` for ``@`` and ``torch.matmul``.

    A call of a module is ``module``; an attribute read is the name of the attribute.
    """
    if node.op == "call_module":
        return "module"
    if node.op in ("placeholder", "get_attr", "output"):
        return node.op
    target = node.target
    if target is getattr and isinstance(node.args[1], str):
        return node.args[1]
    name = target if isinstance(target, str) else getattr(target, "__name__", "?")
    if name == "__get__":  # of an attribute, such as x.mT
        name = getattr(getattr(target, "__self__", None), "__name__", name)
    name = name.strip("_")
    return "matmul" if name == "rmatmul" else name


def value(node: Any) -> Any:
    """Return the example value of a node, None for anything that is not a node."""
    return node.meta.get("value") if isinstance(node, fx.Node) else None


def is_activation(node: Any) -> bool:
    """Whether a node is a floating-point tensor other than a parameter."""
    v = value(node)
    return isinstance(v, Tensor) and v.is_floating_point() and not is_parameter(node)


def is_parameter(node: Any) -> bool:
    """Whether a node is a parameter or buffer, possibly rearranged or cast."""
    while isinstance(node, fx.Node) and op_name(node) in VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return isinstance(node, fx.Node) and node.op == "get_attr"


def from_parameters(node: fx.Node) -> bool:
    """Whether a node is computed from parameters and numbers alone, such as ``1 + weight``.

    A module that is called without arguments (a parametrization) counts as a parameter.
    """
    if node.op == "placeholder":
        return False
    return all(inputs(n) or n.op == "get_attr" or _is_parametrization(n) for n in upstream(node))


def _is_parametrization(node: fx.Node) -> bool:
    return node.op == "call_module" and not node.args and not node.kwargs


def is_row_maximum(node: Any) -> bool:
    """Whether a node is a row maximum: ``max(-1, keepdim=True).values`` or ``amax``."""
    while isinstance(node, fx.Node) and op_name(node) in (*VIEWS, "values"):
        node = node.args[0]
    return isinstance(node, fx.Node) and op_name(node) in ("max", "amax")


def rows_sum_to_one(out: Any) -> bool:
    """Whether each row of ``out`` sums to one, or to zero as in a fully masked row."""
    if type(out) is not Tensor or not out.is_floating_point() or out.is_meta or out.dim() < 3:
        return False
    total = out.sum(-1)
    return bool((out >= 0).all() and ((total - 1).abs().minimum(total.abs()) < 1e-3).all())


def inputs(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose tensors flow into a node, in the order of its arguments.

    An item of a tuple that only forwards values (see :func:`forwarded`) has one input: the node
    that was put into the tuple.
    """
    source = forwarded(node)
    if source is not None:
        return [source]
    found = [n for n in node.all_input_nodes if holds_tensors(value(n))]
    if op_name(node) in _LIKE_ANOTHER:
        found = found[:1]
    return found + [new for n in found for new in _assigned(n, node)]


def _assigned(target: fx.Node, reader: fx.Node) -> list[fx.Node]:
    """Return the nodes assigned to parts of a tensor (``x[a] = y``) before ``reader`` reads it."""
    writes = [u for u in target.users if u.target in _ASSIGNS and u.args[0] is target]
    return [u.args[2] for u in writes if u < reader and isinstance(u.args[2], fx.Node)]


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that ``node`` flows into: those that have it among their :func:`inputs`."""
    stack, seen = list(node.users), set(node.users)
    while stack:
        user = stack.pop(0)
        if node in inputs(user):
            yield user
        if user.target in _ASSIGNS:
            stack += [u for u in user.args[0].users if u not in seen and user < u]  # type: ignore[union-attr]
        elif not isinstance(value(user), Tensor):  # a tuple that forwards it
            stack += [u for u in user.users if u not in seen]
        seen.update(stack)


def forwarded(node: fx.Node) -> fx.Node | None:
    """Return the node whose value ``node`` forwards unchanged, or None if it computes something.

    Values are forwarded at the border of an inlined module (:func:`run_pre_hooks` and
    :func:`run_forward_hooks`), and by a cache's ``update(key, value)``, whose results count as the
    key and the value that it was given.
    """
    path: list[Any] = []
    base: Any = node
    while isinstance(base, fx.Node) and (step := _item_taken(base)) is not None:
        path.insert(0, step)
        base = base.args[0]
    items: Any
    if base.target is run_pre_hooks:
        items = base.args[1:]
    elif base.target is run_forward_hooks:
        items = base.args[2]
    elif op_name(base) == "update" and len(path) == 1:
        items = [n for n in base.args[1:] if isinstance(n, fx.Node) and holds_tensors(value(n))]
    else:
        return None
    for index in path:
        try:
            items = _item(items, index)
        except (KeyError, IndexError, TypeError):
            return None
    return items if isinstance(items, fx.Node) and items is not node else None


def _item(items: Any, index: Any) -> Any:
    """Return an item of a tuple or dict, or of the node that makes a record of them."""
    if not isinstance(items, fx.Node) or items.target is not make_record:
        return items[index]
    held: Any = items.args[1]
    inside: Any = items.args[2]
    return held[index] if isinstance(index, str) and index in held else inside[index]


def _item_taken(node: fx.Node) -> Any:
    """Return which item of a tuple, dict or record a node takes; None if it takes none.

    A field of a named tuple counts by its number.
    """
    if op_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
        return node.args[1]
    if node.target is not getattr or not isinstance(node.args[0], fx.Node):
        return None
    owner, name = value(node.args[0]), node.args[1]
    if name in getattr(owner, "_fields", ()):
        return owner._fields.index(name)
    return name if owner is not None and not isinstance(owner, Tensor) else None


def origin(node: fx.Node) -> fx.Node:
    """Return the node that computed a value, looking through all nodes that forward it."""
    source = forwarded(node)
    return node if source is None else origin(source)


def walk_forward(start: fx.Node, passes: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Return the nodes that ``start`` flows into, breadth first.

    The walk continues through nodes for which ``passes`` is true, and ends at the others, which
    are part of the result.
    """
    reached: list[fx.Node] = []
    queue, seen = [start], {start}
    while queue:
        for user in readers(queue.pop(0)):
            if user not in seen:
                seen.add(user)
                reached.append(user)
                if passes(user) or forwarded(user):
                    queue.append(user)
    return reached


def upstream(node: fx.Node) -> Iterator[fx.Node]:
    """Yield ``node``, then every node whose tensor flows into it, depth first.

    A reader that stops early walks no further: an activation's first end is found in a few steps,
    where the whole of what flows into it may be a graph of ten thousand nodes.
    """
    found, stack = {node}, [node]
    while stack:
        last = stack.pop()
        yield last
        for source in inputs(last):
            if source not in found:
                found.add(source)
                stack.append(source)


def flow(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Return the nodes through which ``start`` flows into ``end``, with both, in graph order."""
    before, stack = {end}, [end]
    while stack:
        fresh = [n for n in inputs(stack.pop()) if n not in before and start < n]
        before.update(fresh)
        stack += fresh
    reached = {start: None}  # a dict, to keep the order
    for node in sorted(before - {start}):
        if any(n in reached for n in inputs(node)):
            reached[node] = None
    return list(reached)


def holds_tensors(v: Any) -> bool:
    """Whether a value is a tensor, or a tuple or list with a tensor in it."""
    return isinstance(v, Tensor) or (
        isinstance(v, (tuple, list)) and any(isinstance(x, Tensor) for x in v)
    )
