"""Let modules that read one value share a product, and write a fused projection once.

    before    q + lora_q(x)      k + lora_k(x)        each module by itself
    after     H = first_products_of(x, lora_q, lora_k)
              after_product(lora_q, q, H[0])      after_product(lora_k, k, H[1])

A pass over a graph whose edits are all made (apply.py). It joins whatever offers
``StartsWithProduct``, of any method and splice. A module with hooks, with dropout in training, or
one that is scaled or routed alone runs as before: each call decides.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.plugin import starts_with_product
from surgery.rewrite.casts import cast
from surgery.rewrite.nodes import added, has_hooks
from surgery.rewrite.products import first_products, lay_side_by_side, split_columns

_IN_PLACE = {f for name, f in vars(operator).items() if name.startswith("i") and callable(f)} - {
    operator.index, operator.indexOf, operator.invert, operator.inv, operator.is_, operator.is_not,
    operator.itemgetter,
}  # fmt: skip


def share_products(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite a graph in place; what it computes stays, but for rounding."""
    _cast_once(graph)
    _join_columns(graph)
    for group in _groups(graph, root):
        _share(graph, root, group)


def added_after(module: Any, y: Tensor, x: Tensor, products: Any, index: int) -> Tensor:
    """Return ``y`` plus the update of a module, from its product with ``x`` if there is one."""
    hidden = None if products is None else products[index]
    if hidden is None:
        return added(module, y, x)
    total: Tensor = module.after_product(hidden, onto=y)
    return total


def added_to_columns(y: Tensor, *updates: tuple[Any, ...]) -> Tensor:
    """Return ``y`` with modules' updates added to columns of it, all in one piece of memory.

    Args:
        updates: (start, stop, module, x, products, index) each, see :func:`added_after`; in the
            order of the columns, which do not overlap.
    """
    edges = [0, *(edge for start, stop, *_ in updates for edge in (start, stop)), y.shape[-1]]
    parts = list(split_columns(y, [b - a for a, b in itertools.pairwise(edges)]))
    for i, (_, _, *update) in enumerate(updates):
        parts[2 * i + 1] = added_after(update[0], parts[2 * i + 1], *update[1:])
    return torch.cat([part for part in parts if part.shape[-1]], -1)


def first_products_of(x: Tensor, *modules: Any) -> list[Tensor | None]:
    """Return the first product of each module with ``x``; None where a module runs as it is."""
    return first_products(x, [_first_factor(module) for module in modules])


def _first_factor(module: Any) -> Tensor | None:
    """Return A of a module, None if its forward must be called."""
    hooked = has_hooks(module) or module._backward_hooks or module._backward_pre_hooks
    if hooked or "forward" in vars(module) or nn.modules.module._has_any_global_hook():
        return None
    factor: Tensor | None = module.first_factor()
    return factor


def _cast_once(graph: fx.Graph) -> None:
    """Let equal casts of one node be one."""
    known: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is cast:
            first = known.setdefault(node.args, node)
            if first is not node and not _written_between(first, node):
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _join_columns(graph: fx.Graph) -> None:
    """Let updates of several columns of one value be one node."""
    for node in list(graph.nodes):
        if node.target is not added_to_columns:
            continue
        before: Any = node.args[0]
        if before.target is not added_to_columns or len(before.users) > 1:
            continue
        updates = sorted((*before.args[1:], *node.args[1:]), key=lambda update: update[0])
        apart = all(a[1] <= b[0] for a, b in itertools.pairwise(updates))
        if apart and not _written_between(before, node):
            node.args = (before.args[0], *updates)
            graph.erase_node(before)


def _groups(graph: fx.Graph, root: nn.Module) -> Iterator[list[fx.Node]]:
    """Yield the nodes of modules that read one value, which nothing writes to in between."""
    found: dict[fx.Node, list[list[fx.Node]]] = {}
    for node in graph.nodes:
        for module, x in _reads(node):
            if starts_with_product(root.get_submodule(module.target)):
                groups = found.setdefault(x, [[]])
                if groups[-1] and _written_between(groups[-1][0], node):
                    groups.append([])
                if node not in groups[-1]:
                    groups[-1].append(node)
    return (group for groups in found.values() for group in groups)


def _reads(node: fx.Node) -> list[tuple[Any, fx.Node]]:
    """Return the modules that a node adds to its value, each with the one value that it reads."""
    args: Any = node.args
    if node.target is added and len(args) == 3:
        return [(args[0], args[2])]
    if node.target is added_to_columns:
        return [(module, x) for _, _, module, x, *_ in args[1:]]
    return []


def _share(graph: fx.Graph, root: nn.Module, group: list[fx.Node]) -> None:
    """Compute the first products of a group in one node, before the first of them."""
    pairs = [pair for node in group for pair in _reads(node)]
    x = pairs[0][1]
    names = [
        m.target for m, read in pairs
        if read is x and starts_with_product(root.get_submodule(m.target))
    ]  # fmt: skip
    with graph.inserting_before(group[0]):
        modules = [graph.get_attr(name) for name in names]
        products = graph.call_function(first_products_of, (x, *modules))
    for node in group:
        _let_read(node, x, products, names)
    factors = {
        id(a): a for name in names if (a := _first_factor(root.get_submodule(name))) is not None
    }
    lay_side_by_side(list(factors.values()))


def _let_read(node: fx.Node, x: fx.Node, products: fx.Node, names: Sequence[str]) -> None:
    args: Any = node.args
    if node.target is added:
        node.target = added_after
        node.args = (*args, products, names.index(args[0].target))
        return
    node.args = (
        args[0],
        *(
            (*update[:4], products, names.index(update[2].target))
            if update[3] is x and update[2].target in names
            else update
            for update in args[1:]
        ),
    )


def _written_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether a node from ``first`` to ``last`` may write to a value in place."""
    node = first
    while node is not last:
        node = node.next
        name = str(
            node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        )
        named = name.endswith("_") and not name.endswith("__")
        if named or node.target in _IN_PLACE or node.kwargs.get("inplace"):
            return True
    return False
