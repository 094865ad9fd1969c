"""Let an edit count in part: scaled by a factor, or for some rows of the batch alone.

    scaled    y := y + w (edit(y) - y)
    routed    y[rows] := edit(y[rows])        each row of the batch may have another adapter

The nodes stand around those of the edit itself, so every method can be scaled and routed, and an
inserted module sees its own rows alone. The factor and the rows are asked for at each call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from surgery.rewrite.grouped import grouped
from surgery.rewrite.rows import Rows, put_counted, put_rows, take_read_rows, take_rows

Build = Callable[[fx.Node, tuple[fx.Node | None, ...], fx.Node | None], fx.Node]


@dataclass(frozen=True)
class Partly:
    """How an edit takes part in a graph.

    Attributes:
        routed: whether it has some rows of the batch; else it is scaled.
        share: returns the :class:`Rows`, or the factor, of the running call.
        children: of a group of splices that act as one edit (grouped.py), the inserted module of
            each, by splice; ``share`` then returns ``Picks``.
    """

    routed: bool
    share: Callable[[], Rows | float]
    children: Mapping[str, str] | None = None

    def around(
        self,
        build: Build,
        y: fx.Node,
        reads: tuple[fx.Node | None, ...],
        batched: tuple[bool, ...],
        put: Callable[[Tensor, Tensor, Rows], Tensor] = put_rows,
    ) -> fx.Node:
        """Add the nodes of an edit that counts in part, and return the last.

        Args:
            build: adds the nodes of the edit to y, given y, what the edit reads, and the node of
                what is called in place of the inserted module, or None.
            y, reads: the node that is edited, and the others; None is passed on.
            batched: whether the first axis of each of ``reads`` is the batch, as it is of y.
            put: puts the rows back, scaled by their factors.
        """
        graph = y.graph
        share = graph.call_function(self.share, ())
        if not self.routed:
            with graph.inserting_after(share):
                new = build(y, reads, None)
            with graph.inserting_after(new):
                return graph.call_function(scaled, (y, new, share))
        last, callee, taken = share, None, list[Any]()
        if self.children is not None:
            host = next(iter(graph.nodes))  # the first placeholder
            with graph.inserting_after(share):
                last = callee = graph.call_function(grouped, (host, share, dict(self.children)))
        for node, has_rows in zip((y, *reads), (True, *batched), strict=True):
            if node is not None and has_rows:
                take = take_read_rows if taken else take_rows
                with graph.inserting_after(last):
                    last = graph.call_function(take, (node, share))
                    last.meta["value"] = node.meta.get("value")
            taken.append(last if node is not None and has_rows else node)
        with graph.inserting_after(last):
            new = build(taken[0], tuple(taken[1:]), callee)
        with graph.inserting_after(new):
            return graph.call_function(put, (y, new, share))

    def count(
        self,
        build: Build,
        lse: fx.Node,
        reads: tuple[fx.Node, ...],
    ) -> fx.Node:
        """Add the nodes of the lse that counts the virtual keys of such an edit."""
        if self.routed:
            return self.around(build, lse, reads, (True,) * len(reads), put_counted)
        graph, total = lse.graph, build(lse, reads, None)
        with graph.inserting_after(total):
            share = graph.call_function(self.share, ())
        with graph.inserting_after(share):
            return graph.call_function(counted, (lse, total, share))


def scaled(y: Tensor, new: Tensor, factor: float) -> Tensor:
    """Return ``y + factor (new - y)``."""
    return y + factor * (new - y)


def counted(lse: Tensor, total: Tensor, factor: float) -> Tensor:
    """Return the lse that counts virtual keys in part, between ``lse`` and ``total``.

    It is log((1 - w) exp(lse) + w exp(total)) for a factor w between 0 and 1, and else that of the
    nearer end.
    """
    if factor <= 0 or factor >= 1:
        return lse if factor <= 0 else total
    return torch.logaddexp(lse + math.log1p(-factor), total + math.log(factor))
