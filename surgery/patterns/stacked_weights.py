"""Tell how a module of experts uses the stacks of weights (experts, in, out) that it owns.

    W -> W[e], W.transpose(1, 2), ... -> x W      a product; the module may run it in a loop over
                                                  experts, batched, or grouped by expert

A stack is followed through look-ups and transpositions to the first product with it, which tells
whether each matrix is (in, out) or (out, in). The product that reads what another one gives is the
experts' last; of two others, the gate passes the nonlinearity. Names play no role.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from surgery.patterns.dataflow import VIEWS, op_name, upstream, value
from surgery.patterns.ffn import passes_nonlinearity

# The products, and which of their arguments is the matrix where it may be only one.
_PRODUCTS = ("linear", "matmul", "mm", "bmm", "grouped_mm", "grouped_mm_fallback")
_FLIPS = ("transpose", "mT", "T", "t", "swapaxes", "swapdims", "adjoint")


@dataclass(frozen=True)
class StackedMap:
    """How a stack of weights is used.

    Attributes:
        port: ``up``, ``gate`` or ``output``.
        transposed: whether each matrix is stored as (out, in).
    """

    port: str
    transposed: bool


def stacked_maps(nodes: Sequence[fx.Node], root: nn.Module) -> dict[str, StackedMap]:
    """Return the use of each stack in the nodes of one call of a module, by the stack's name.

    The result is empty if the products are not those of one linear layer or of an FFN.
    """
    products: dict[str, tuple[fx.Node, bool]] = {}
    for node in nodes:
        held = value(node)
        if node.op == "get_attr" and isinstance(held, nn.Parameter) and held.dim() == 3:
            found = _first_product(node) if len(held) > 1 and held.is_floating_point() else None
            if found is not None:
                products[str(node.target)] = found
    made = {node: name for name, (node, _) in products.items()}
    last = [name for name, (node, _) in products.items()
            if any(n in made and n is not node for n in upstream(node))]  # fmt: skip
    first = [name for name in products if name not in last]
    if len(products) == 1:
        last, first = first, []
    if len(last) != 1 or len(first) > 2:
        return {}
    roles = {last[0]: "output"} | dict.fromkeys(first, "up")
    if len(first) == 2:
        end = products[last[0]][0]
        gates = [name for name in first if passes_nonlinearity(products[name][0], end, root)]
        if len(gates) != 1:
            return {}
        roles[gates[0]] = "gate"
    return {name: StackedMap(roles[name], products[name][1]) for name in products}


def _first_product(stack: fx.Node) -> tuple[fx.Node, bool] | None:
    """Return the first product with a stack, or a part of it, and whether it is (out, in) there."""
    queue, seen = [(stack, False)], {stack}
    while queue:
        node, flipped = queue.pop(0)
        for user in node.users:
            name = op_name(user)
            if name in _PRODUCTS:
                operands = [a for a in user.args[:2] if isinstance(value(a), Tensor)]
                behind = len(operands) == 2 and operands[1] is node
                return user, flipped ^ (name == "linear") ^ (not behind)
            if user in seen or not (name in VIEWS or name in _FLIPS):
                continue
            seen.add(user)
            queue.append((user, flipped ^ _flips(user, node)))
    return None


def _flips(user: fx.Node, node: fx.Node) -> bool:
    """Whether a view swaps the last two axes of each matrix."""
    if op_name(user) == "permute":
        return bool(value(user).stride()[-2:] == value(node).stride()[:-3:-1])
    return op_name(user) in _FLIPS
