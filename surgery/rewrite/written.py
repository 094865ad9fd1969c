"""Tell whether a graph may write to a value in place or return it, itself or a view of it."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx, nn

_VIEWS = {
    "T", "chunk", "contiguous", "expand", "expand_as", "flatten", "getitem", "mT", "movedim",
    "narrow", "permute", "reshape", "select", "split", "squeeze", "swapaxes", "to", "transpose",
    "type_as", "unbind", "unflatten", "unsqueeze", "view", "view_as",
}  # fmt: skip
_AUGMENTED = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift,
    operator.irshift, operator.imatmul, operator.setitem,
}  # fmt: skip


def may_be_written(x: fx.Node, root: nn.Module) -> bool:
    """Whether a node writes to the value of ``x``, or to a view of it."""
    return any(_writes(user, root) for user in _readers(x))


def leaves(x: fx.Node) -> bool:
    """Whether the value of ``x``, or a view of it, is a part of what the graph returns."""
    return any(user.op == "output" for user in _readers(x))


def _readers(x: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that read the value of ``x`` or a view of it."""
    seen, todo = {x}, [x]
    while todo:
        for user in todo.pop().users:
            yield user
            if user not in seen and name_of(user) in _VIEWS:
                seen.add(user)
                todo.append(user)


def _writes(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = name_of(node)
    named = name.endswith("_") and not name.endswith("__")
    return named or node.target in _AUGMENTED or bool(node.kwargs.get("inplace"))


def name_of(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
