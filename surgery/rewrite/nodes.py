"""Edits of a graph: the verbs ``insert``, ``add`` and ``replace`` as pure functions on nodes.

Each takes nodes of one graph, puts new ones behind them, and lets all later readers of the edited
value read the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from surgery.errors import PortError
from surgery.interop import real_tensors


def rewrite(
    node: fx.Node,
    reads: Sequence[fx.Node],
    make: Callable[[fx.Graph], fx.Node],
    fresh: Collection[fx.Node] = (),
) -> fx.Node:
    """Put what ``make`` builds behind ``node`` and ``reads``; readers of ``node`` read it instead.

    ``fresh`` are nodes that were made for ``reads``: they go on reading ``node`` as it was.

    Raises:
        PortError: something reads ``node`` before all of ``reads`` are there.
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
    with graph.inserting_after(_behind(last)):
        new = make(graph)
    created = set(graph.nodes) - before
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in created)
    return new


def _behind(node: fx.Node) -> fx.Node:
    """Placeholders stay together at the top, so behind one means behind them all."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def chain(graph: fx.Graph, *steps: tuple[Any, tuple[Any, ...]]) -> fx.Node:
    """Nodes one behind the other; ``...`` among the arguments stands for the step before."""
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


def add(y: Tensor, delta: Tensor) -> Tensor:
    """``y + delta``, in the dtype of ``y``.

    Tokens may lie on another number of axes there: (h, w, D) or (B n, D) against (B, n, D).
    """
    return y + put(y, delta)


def added(module: Any, y: Tensor, *reads: Tensor) -> Tensor:
    """``y + module(*reads)``, added by the module itself, unless hooks look at what it gives."""
    if module._forward_hooks or module._forward_pre_hooks:
        return add(y, module(*reads))
    total: Tensor = module(*reads, onto=y)
    return total


def add_sequence_first(y: Tensor, delta: Tensor) -> Tensor:
    """``y + delta`` for y (n, B, D), or (n B, D), and delta (B, n, D)."""
    return y + put_sequence_first(y, delta)


def put(y: Tensor, new: Tensor) -> Tensor:
    """``new`` in the place of ``y``, with its dtype and its axes, see :func:`add`."""
    return (new if new.shape == y.shape else new.reshape(y.shape)).to(y.dtype)


def put_sequence_first(y: Tensor, new: Tensor) -> Tensor:
    """``new`` (B, n, D) in the place of y (n, B, D), or (n B, D)."""
    return new.transpose(0, 1).reshape(y.shape).to(y.dtype)


def rows_like(lse: Tensor, heads: Tensor) -> Tensor:
    """``lse`` with one number for each row of ``heads``: (B H, n) -> (B, H, n), say."""
    return lse.reshape(heads.shape[:-1])


def tokens_like(y: Tensor, heads: Tensor, sequence_first: bool) -> Tensor:
    """``y`` as (B, n, D), for heads (B, H, n, d): its tokens may lie on other axes."""
    batch, _, n, _ = heads.shape
    if sequence_first:
        return y.reshape(n, batch, -1).transpose(0, 1)
    return y.reshape(batch, n, -1)


def reorder(heads: Tensor, order: tuple[int, ...]) -> Tensor:
    """Heads in the order of an einsum, (n, B, H, d) say, as (B, H, n, d)."""
    return heads.permute(order)


class Columns(NamedTuple):
    """Functions that a graph can call, for the columns of one port of a fused projection."""

    take: Callable[[Tensor], Tensor]
    put: Callable[[Tensor, Tensor], Tensor]
    add: Callable[[Tensor, Tensor], Tensor]


def column_functions(chosen: Sequence[int], device: torch.device) -> Columns:
    """Functions for some columns of a tensor on a device.

    Returns:
        take: these columns of ``y``.  put: ``y`` with them replaced.  add: ``y`` with more in them.
    """
    start, stop = chosen[0], chosen[-1] + 1
    together = list(chosen) == list(range(start, stop))
    with real_tensors(), torch.inference_mode(False):  # it outlives the call that is captured
        index = torch.tensor(chosen, device=device)

    def take_columns(y: Tensor) -> Tensor:
        return y[..., start:stop] if together else y.index_select(-1, index)

    def put_columns(y: Tensor, new: Tensor) -> Tensor:
        if not together:
            return y.index_copy(-1, index, new.to(y.dtype))
        whole = y.clone()
        whole[..., start:stop] = new.to(y.dtype)
        return whole

    def add_columns(y: Tensor, delta: Tensor) -> Tensor:
        return y.index_add(-1, index, delta.to(y.dtype))

    return Columns(take_columns, put_columns, add_columns)
