"""The attention pattern: Q K^T -> ... -> softmax -> ... -> (softmax) V, or one call for it all."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.patterns.attention_ports import assemble, on_the_way
from surgery.patterns.dataflow import (
    ARITHMETIC,
    PRODUCTS,
    VIEWS,
    flow,
    inputs,
    is_activation,
    is_parameter,
    normalises,
    op_name,
    value,
    walk_on,
)
from surgery.patterns.layout import features, trace, turned, varies
from surgery.patterns.match import Match, PortNode
from surgery.patterns.projection import einsum_letters, projection, walk_back
from surgery.patterns.scores import scalars_between

# What may stand between scores and softmax, and between softmax and its product with the values.
_SCORE_OPS = (
    VIEWS
    | ARITHMETIC
    | frozenset(
        "masked_fill masked_fill_ tanh clamp max min maximum amax nan_to_num add_ softmax module "
        "pad as_strided".split()
    )
)


def attention_pattern(node: fx.Node, root: nn.Module) -> Match | None:
    if node.meta.get("attention"):
        return _from_call(node, root, first=1)
    name = op_name(node)
    if name == "scaled_dot_product_attention":
        return _from_call(node, root, first=0)
    if name == "apply" and normalises(value(node)):  # a softmax that an autograd function does
        found = _from_softmax(node, root)
        if found is not None:
            found.missing["lse"] = "its softmax is inside an autograd function of its own"
        return found
    return _from_softmax(node, root) if name == "softmax" or _by_hand(node) else None


def _by_hand(node: fx.Node) -> bool:
    """``exp(x - logsumexp(x))``: a softmax as well."""
    shifted = node.args[0] if op_name(node) == "exp" and node.args else None
    if not isinstance(shifted, fx.Node) or op_name(shifted) != "sub":
        return False
    return isinstance(shifted.args[1], fx.Node) and op_name(shifted.args[1]) == "logsumexp"


def _from_call(node: fx.Node, root: nn.Module, first: int) -> Match | None:
    names = ("query", "key", "value", "attention_mask" if first else "attn_mask")
    given: dict[str, Any] = dict(zip(names, node.args[first:], strict=False)) | dict(node.kwargs)
    heads = [given.get(n) for n in names[:3]]
    if not all(isinstance(h, fx.Node) for h in heads):
        return None
    scale = given.get("scaling" if first else "scale")
    context: fx.Node = node
    ports: dict[str, PortNode] = {}
    if first:
        parts = {u.args[1]: u for u in node.users if op_name(u) == "getitem"}
        context = parts.get(0, node)
        if isinstance(value(parts.get(1)), Tensor):
            ports["weights"] = PortNode(parts[1])
    mask = given.get(names[3])
    if isinstance(mask, fx.Node) and isinstance(value(mask), Tensor):
        ports["mask"] = PortNode(mask)
    query, key, val = (h for h in heads if isinstance(h, fx.Node))
    if not _contracts_features(query, root):
        return None
    found = assemble(node, root, query, key, val, context, ports, _number(scale))
    if found is not None:
        found.softcap, window = _number(given.get("softcap")), _number(given.get("sliding_window"))
        found.window = None if window is None else int(window)
    return found


def _from_softmax(node: fx.Node, root: nn.Module) -> Match | None:
    scores = next((n for n in node.all_input_nodes if is_activation(n)), None)
    if scores is None or value(scores).dim() < 3:
        return None
    product = _product_behind(scores, root)
    if product is None:
        return None
    operands = [n for n in product.all_input_nodes if is_activation(n)]
    if op_name(product) == "baddbmm":
        operands = operands[-2:]
    later = [node, *walk_on(node, lambda n: op_name(n) in _SCORE_OPS)]
    mixed = next((n for n in later if op_name(n) in PRODUCTS), None)
    if mixed is None:
        return None
    others = [n for n in mixed.all_input_nodes if is_activation(n) and n not in later]
    if not others:
        return None
    query, key = operands[0], _untransposed(operands[1], operands[0])
    if turned(product, scores):
        query, key = _untransposed(operands[1], operands[0]), operands[0]
    if op_name(product) != "einsum" and not _contracts_features(query, root):
        return None
    weights = next(n for n in mixed.all_input_nodes if n in later)
    if not _mixes_what_is_normalised(node, weights, mixed):
        return None
    order = _einsum_order(product, query)
    found = assemble(
        node, root, query, key, others[0], mixed, {"weights": PortNode(weights)},
        scalars_between(flow(product, scores)), order,
    )  # fmt: skip
    if found is None:
        return None
    found.softmax_input = scores
    _set_orders(found, product, mixed, key is operands[1])
    bends = [n for n in flow(product, scores) if op_name(n) == "tanh"]
    found.softcap = scalars_between(flow(bends[-1], scores)) if bends else None
    found.nodes += [*flow(product, node), *flow(node, mixed)]
    rows = value(query).permute(order) if order else value(query)
    if value(scores).shape[:-1].numel() != rows.shape[:-1].numel():
        found.missing.setdefault("lse", "rows of its softmax are not those of its query heads")
    return found


def _set_orders(found: Match, product: fx.Node, mixed: fx.Node, turned: bool) -> None:
    """How keys and values lie, where not (..., m, d); ``turned``: as the right of a product."""
    key, val = (found.ports[name].node for name in ("key_heads", "value_heads"))
    axes = tuple(range(value(key).dim()))
    orders: dict[str, tuple[int, ...] | None] = {}
    if op_name(product) == "einsum":
        orders["key_heads"] = _einsum_order(product, key)
    elif turned:  # made like that, and never otherwise
        orders["key_heads"] = (*axes[:-2], axes[-1], axes[-2])
        if len(axes) == 3:  # one key head for each of the query
            found.kv_heads = found.heads
    if op_name(mixed) == "einsum" and einsum_letters(mixed)[0]:
        last = _einsum_order(mixed, val) or tuple(range(value(val).dim()))  # summed axis at the end
        orders["value_heads"] = (*last[:-2], last[-1], last[-2])
    found.orders = {name: order for name, order in orders.items() if order is not None}


def _mixes_what_is_normalised(softmax: fx.Node, weights: fx.Node, mixed: fx.Node) -> bool:
    """Does the product with the values sum over the axis that the softmax normalised?"""
    given = [a for a in (*softmax.args[1:2], softmax.kwargs.get("dim")) if isinstance(a, int)]
    if not given or op_name(mixed) == "einsum" or op_name(softmax) != "softmax":
        return True
    shape = value(softmax).shape
    numbers = torch.arange(shape[given[0]], dtype=torch.int32)
    numbers = numbers.reshape([-1 if i == given[0] % len(shape) else 1 for i in range(len(shape))])
    found = trace(softmax, numbers.expand(shape), weights)
    operands = [n for n in mixed.all_input_nodes if is_activation(n)]
    axis = -1 if weights is operands[-2] else -2
    return found is None or found.shape[axis] < 2 or varies(found, axis)


def _einsum_order(product: fx.Node, query: fx.Node) -> tuple[int, ...] | None:
    """The order of axes that makes the query heads of an einsum (..., n, d), as in its scores."""
    if op_name(product) != "einsum":
        return None
    given, made = einsum_letters(product)
    operands = [n for n in product.args[1:] if isinstance(n, fx.Node)]
    if not given or query not in operands:
        return None
    letters = given[operands.index(query)]
    wanted = "".join(x for x in made if x in letters) + "".join(x for x in letters if x not in made)
    order = tuple(letters.index(x) for x in wanted)
    return None if order == tuple(range(len(order))) else order


def _contracts_features(query: fx.Node, root: nn.Module) -> bool:
    """Are features on the last axis of the heads, not tokens (as where channels attend)?"""
    ends, _, _ = walk_back(query, root, partial(on_the_way, root))
    if not ends:
        return True
    found = trace(ends[0].node, features(ends[0]), query)
    return found is None or found.shape[-1] < 2 or varies(found, -1)


def _product_behind(scores: fx.Node, root: nn.Module) -> fx.Node | None:
    """The product of two activations that the scores come from."""
    queue, seen = [scores], {scores}
    found: list[fx.Node] = []
    while queue:
        node = queue.pop(0)
        if op_name(node) in PRODUCTS:
            operands = [n for n in node.all_input_nodes if is_activation(n)]
            if len(operands) >= 2 and not any(is_parameter(n) for n in operands):
                found.append(node)
            continue
        if op_name(node) not in _SCORE_OPS or projection(node, root):
            continue
        for before in inputs(node):
            if _carries(before) and before not in seen:
                seen.add(before)
                queue.append(before)
    if not found:
        return None
    order = {n: i for i, n in enumerate(scores.graph.nodes)}
    return min(found, key=lambda n: order[n])


def _carries(node: fx.Node) -> bool:
    return is_activation(node) or isinstance(value(node), tuple)


def _untransposed(key: fx.Node, query: fx.Node) -> fx.Node:
    """The key heads before the transposition that the product needs."""
    if op_name(key) in ("transpose", "permute", "mT", "swapaxes"):
        before = key.all_input_nodes[0]
        again = value(key).mT  # a permutation may do more than that: (B, m, G, d) to (B, G, d, m)
        same = again.shape == value(before).shape and again.stride() == value(before).stride()
        if same and again.shape[-1] == value(query).shape[-1]:
            return before
    return key


def _number(x: Any) -> float | None:
    x = value(x) if isinstance(x, fx.Node) else x
    return float(x) if isinstance(x, (int, float)) else None
