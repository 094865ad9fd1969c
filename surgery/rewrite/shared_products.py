"""Let modules that read one value share a product, and write a fused projection once.

    before    q + lora_q(x)      k + lora_k(x)        each module by itself
    after     H, x = first_products_of(x, lora_q, lora_k)
              after_product(lora_q, q(x), H[0])      after_product(lora_k, k(x), H[1])

A pass over a graph whose edits are all made (apply.py). It joins whatever offers
``StartsWithProduct``, of any method and splice. A module with hooks, with dropout in training, or
one that is scaled or routed alone runs as before: each call decides.

The base reads x from the shared node, too, so its gradient enters the product that the modules'
gradients flow back through, and no operator adds the two.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.plugin import starts_with_product
from surgery.rewrite.casts import cast
from surgery.rewrite.nodes import added, after_inputs, has_hooks
from surgery.rewrite.products import first_products, split_columns
from surgery.rewrite.side_by_side import KeptStack, lay_side_by_side
from surgery.rewrite.written import leaves, may_be_written, name_of

# What reads no values has no gradient; conditions on shapes are tested before the graph runs.
_SHAPES = {"getattr", "size", "dim", "ndimension", "numel", "stride", "is_contiguous", "len"}


def share_products(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite a graph in place; what it computes stays, but for rounding."""
    _cast_once(graph, root)
    _join_columns(graph, root)
    for x, readers in _groups(graph, root).items():
        _share(graph, root, x, readers)


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


def sharing() -> Callable[..., tuple[list[Tensor | None], Tensor]]:
    """Return a function for one node of a graph, which keeps the stack of the node's factors."""
    stack = KeptStack()

    def first_products_of(x: Tensor, *modules: Any) -> tuple[list[Tensor | None], Tensor]:
        """Return the first product of each module with ``x``, and ``x`` for later readers.

        A product is None where the module's forward must be called.
        """
        return first_products(x, _first_factors(modules), stack)

    return first_products_of


def _first_factors(modules: Sequence[Any]) -> list[Tensor | None]:
    """Return A of each module, None of one whose forward must be called."""
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return [None] * len(modules)
    # Dynamo sees the modules that the graph was made for; others may have taken their place since.
    unchanged = torch.compiler.is_compiling()
    return [
        module.first_factor()
        if not (
            has_hooks(module)
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in vars(module)
        )
        and (unchanged or starts_with_product(module))
        else None
        for module in modules
    ]


def _cast_once(graph: fx.Graph, root: nn.Module) -> None:
    """Let equal casts of one node be one."""
    known: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is cast and not may_be_written(node.args[0], root):
            first = known.setdefault(node.args, node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _join_columns(graph: fx.Graph, root: nn.Module) -> None:
    """Let updates of several columns of one value be one node, where the last of them stands."""
    for node in list(graph.nodes):
        before: Any = node.args[0] if node.target is added_to_columns else None
        if before is None or before.target is not added_to_columns or len(before.users) > 1:
            continue
        updates = sorted((*before.args[1:], *node.args[1:]), key=lambda update: update[0])
        apart = all(a[1] <= b[0] for a, b in itertools.pairwise(updates))
        if apart and not any(may_be_written(update[3], root) for update in updates):
            node.args = (before.args[0], *updates)
            graph.erase_node(before)


def _groups(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, list[fx.Node]]:
    """Return the nodes of modules that begin with a product, by the value that they read."""
    found: dict[fx.Node, dict[fx.Node, None]] = {}
    for node in graph.nodes:
        for name, x in _reads(node):
            if starts_with_product(root.get_submodule(name)):
                found.setdefault(x, {})[node] = None
    return {x: list(nodes) for x, nodes in found.items() if not may_be_written(x, root)}


def _reads(node: fx.Node) -> list[tuple[str, fx.Node]]:
    """Return the modules that a node adds to its value, each with the one value that it reads."""
    args: Any = node.args
    if node.target is added and len(args) == 3:
        return [(args[0].target, args[2])]
    if node.target is added_to_columns:
        return [(module.target, x) for _, _, module, x, *_ in args[1:]]
    return []


def _share(graph: fx.Graph, root: nn.Module, x: fx.Node, readers: Sequence[fx.Node]) -> None:
    """Compute the first products of modules that read ``x`` in one node behind it."""
    named = [name for node in readers for name, read in _reads(node) if read is x]
    names = [name for name in named if starts_with_product(root.get_submodule(name))]
    # What is returned must stay what it is: others may compare it, or write to it.
    others = [] if leaves(x) else [u for u in x.users if name_of(u) not in _SHAPES]
    with graph.inserting_after(after_inputs(x)):
        both = graph.call_function(sharing(), (x,))
    with graph.inserting_before(both):
        both.args = (x, *(graph.get_attr(name) for name in names))
    with graph.inserting_after(both):
        products = graph.call_function(operator.getitem, (both, 0))
        passed = graph.call_function(operator.getitem, (both, 1))
    passed.meta.update(x.meta)
    for user in others:
        if user not in readers:
            user.replace_input_with(x, passed)
    for node in readers:
        _let_read(node, x, products, names)
    factors = _first_factors([root.get_submodule(name) for name in names])
    lay_side_by_side(list({id(a): a for a in factors if a is not None}.values()))


def _let_read(node: fx.Node, x: fx.Node, products: fx.Node, names: Sequence[str]) -> None:
    """Let a node use the products that it needs."""
    args: Any = node.args
    if node.target is added:
        node.target = added_after
        node.args = (*args, products, names.index(args[0].target))
        return
    own = [update[3] is x and update[2].target in names for update in args[1:]]
    node.args = (
        args[0],
        *(
            (*update[:4], products, names.index(update[2].target)) if mine else update
            for update, mine in zip(args[1:], own, strict=True)
        ),
    )
