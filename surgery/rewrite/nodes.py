"""Put new nodes into a graph, and define the functions that these nodes call.

The functions stand in the generated code of a variant. They give a module's output the dtype and
the axes of the port that it edits: a port may be (n, B, D), (h, w, D) or a part of a fused
projection's columns, where a module reads and returns (B, n, D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from surgery.errors import PortError
from surgery.interop import real_tensors
from surgery.patterns import PortNode, value


def insert_after(
    node: fx.Node,
    reads: Sequence[fx.Node],
    make: Callable[[fx.Graph], fx.Node],
    fresh: Collection[fx.Node] = (),
) -> fx.Node:
    """Let all readers of ``node`` read what ``make`` builds instead.

    The new nodes stand after ``node`` and the last of ``reads``.

    Args:
        node: the node whose value is edited.
        reads: the other nodes that the new ones read.
        make: builds the new nodes and returns the last of them.
        fresh: nodes that were made for ``reads``; they keep reading ``node`` itself.

    Raises:
        PortError: ``node`` is read before all of ``reads`` are computed.
    """
    graph = node.graph
    order = {n: i for i, n in enumerate(graph.nodes)}
    last = max([node, *reads], key=lambda n: order[n])
    users = [user for user in node.users if user not in fresh]
    early = [u for u in users if order[u] <= order[last] and u is not last]
    if early or last in users:
        raise PortError(
            f"an edit of {node.name!r} reads {last.name!r}, which is computed only after "
            f"{(early or [last])[0].name!r} has used {node.name!r}. Read ports that come earlier."
        )
    before = set(graph.nodes) - set(fresh)
    with graph.inserting_after(after_inputs(last)):
        new = make(graph)
    created = set(graph.nodes) - before
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in created)
    return new


def after_inputs(node: fx.Node) -> fx.Node:
    """Return the last placeholder for a placeholder: they must stay together at the top."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def chain(graph: fx.Graph, *steps: tuple[Any, tuple[Any, ...]]) -> fx.Node:
    """Add one node per step, and return the last.

    Args:
        steps: a target (the name of a module, or a function) and its arguments. ``...`` among the
            arguments stands for the node of the step before.
    """
    node: Any = None
    for target, args in steps:
        filled = tuple(node if a is ... else a for a in args)
        make = graph.call_module if isinstance(target, str) else graph.call_function
        if node is None:
            node = make(target, filled)
        else:
            with graph.inserting_after(node):
                node = make(target, filled)
    return node  # type: ignore[no-any-return]


def calling(child: str, callee: fx.Node | None, args: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a step of :func:`chain` that calls ``callee``, or the module ``child`` without one."""
    return (child, tuple(args)) if callee is None else (called, (callee, *args))


def called(module: Any, *args: Any) -> Any:
    """Call what a node holds."""
    return module(*args)


def add(y: Tensor, delta: Tensor) -> Tensor:
    """Return ``y + delta``, in the dtype of ``y``.

    The tokens of ``y`` may have other axes, (h, w, D) or (B n, D), than delta (B, n, D).
    """
    return y + put(y, delta)


def added(module: Any, y: Tensor, *reads: Tensor) -> Tensor:
    """Return ``y + module(*reads)``, summed by the module itself (``onto``).

    A forward hook on the module must see its output without ``y``; then the sum is taken here.
    """
    if has_hooks(module):
        return add(y, module(*reads))
    total: Tensor = module(*reads, onto=y)
    return total


def has_hooks(module: Any) -> bool:
    """Whether a forward hook on an inserted module must see what goes in and comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def added_grouped(modules: Any, y: Tensor, *reads: Tensor) -> Tensor:
    """Return the sum that a group of modules makes itself (``Grouped``)."""
    total: Tensor = modules(*reads, onto=y)
    return total


def add_sequence_first(y: Tensor, delta: Tensor) -> Tensor:
    """Return ``y + delta`` for y (n, B, D) or (n B, D) and delta (B, n, D)."""
    return y + put_sequence_first(y, delta)


def put(y: Tensor, new: Tensor) -> Tensor:
    """Return ``new`` in the dtype and with the axes of ``y``, see :func:`add`."""
    return (new if new.shape == y.shape else new.reshape(y.shape)).to(y.dtype)


def put_sequence_first(y: Tensor, new: Tensor) -> Tensor:
    """Return new (B, n, D) in the dtype and with the axes of y (n, B, D) or (n B, D)."""
    return new.transpose(0, 1).reshape(y.shape).to(y.dtype)


def rows_like(lse: Tensor, heads: Tensor) -> Tensor:
    """Return ``lse`` with the axes of ``heads`` before the last, as (B H, n) -> (B, H, n)."""
    return lse.reshape(heads.shape[:-1])


def tokens_like(y: Tensor, heads: Tensor, sequence_first: bool) -> Tensor:
    """Return ``y`` as (B, n, D), with B and n of heads (B, H, n, d).

    Args:
        sequence_first: ``y`` is (n, B, D) or (n B, D).
    """
    batch, _, n, _ = heads.shape
    width = -1 if y.numel() else _width(y, n)
    if sequence_first:
        return y.reshape(n, batch, width).transpose(0, 1)
    return y.reshape(batch, n, width)


def _width(y: Tensor, n: int) -> int:
    """Return D of an empty batch, which has no number of elements to divide."""
    return math.prod(y.shape[2:]) if y.dim() == 4 and y.shape[1] == n else y.shape[-1]


def reorder(heads: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return heads as (B, H, n, d), from the axes of an einsum such as (n, B, H, d)."""
    return heads.permute(order)


class Columns(NamedTuple):
    """Functions for the columns of one port of a fused projection; a graph can call them.

    Attributes:
        take: y (..., W) -> its columns (..., C).
        put: y, new (..., C) -> ``y`` with these columns replaced.
        add: y, delta (..., C) -> ``y`` with ``delta`` added to these columns.
        slice: (start, stop) of columns that lie side by side; None of others.
    """

    take: Callable[[Tensor], Tensor]
    put: Callable[[Tensor, Tensor], Tensor]
    add: Callable[[Tensor, Tensor], Tensor]
    slice: tuple[int, int] | None


def _tokens_as(y: Tensor, new: Tensor) -> Tensor:
    """Return ``new`` in the dtype of ``y``, with its axes before the last."""
    return new.reshape(*y.shape[:-1], new.shape[-1]).to(y.dtype)


def device_of(port: PortNode) -> torch.device:
    """Return the device of a port's value; a call on another device has another graph."""
    held: torch.Tensor = value(port.node)
    return held.device


def column_functions(chosen: Sequence[int], device: torch.device) -> Columns:
    """Return the functions for columns ``chosen`` of tensors on one device.

    Columns that lie side by side are read as a slice, which copies nothing; others by an index.
    """
    start, stop = chosen[0], chosen[-1] + 1
    together = list(chosen) == list(range(start, stop))
    with real_tensors(), torch.inference_mode(False):  # the index outlives the captured call
        index = torch.tensor(chosen, device=device)

    def take_columns(y: Tensor) -> Tensor:
        return y[..., start:stop] if together else y.index_select(-1, index)

    def put_columns(y: Tensor, new: Tensor) -> Tensor:
        new = _tokens_as(y, new)
        if not together:
            return y.index_copy(-1, index, new)
        whole = y.clone()
        whole[..., start:stop] = new
        return whole

    def add_columns(y: Tensor, delta: Tensor) -> Tensor:
        return y.index_add(-1, index, _tokens_as(y, delta))

    return Columns(take_columns, put_columns, add_columns, (start, stop) if together else None)
