"""Recognise an attention by its softmax, or by one call that contains the softmax.

    Q K^T -> ... -> softmax -> ... -> (softmax) V

A call of SDPA, or of an attention function that capture keeps whole (``meta["attention"]``), has
query, key, value and mask among its arguments. Elsewhere the walk starts at a softmax: back to the
product of queries and keys, and on to the product with the values.

A product of two activations around a softmax need not be attention over tokens. Channel attention
contracts tokens instead of features, and a softmax may normalise an axis other than the
summed one. Labels that are propagated through the graph (layout.py) show both; neither
gives a match.
"""

from __future__ import annotations

from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.patterns.attention_ports import assemble, may_precede_heads
from surgery.patterns.dataflow import (
    ARITHMETIC,
    PRODUCTS,
    VIEWS,
    flow,
    forwarded,
    inputs,
    is_activation,
    is_parameter,
    op_name,
    rows_sum_to_one,
    value,
    walk_forward,
)
from surgery.patterns.layout import features, is_transposed, propagate_labels, varies
from surgery.patterns.match import Match, PortNode
from surgery.patterns.projection import einsum_letters, projection, walk_back
from surgery.patterns.rows import weights_come_first
from surgery.patterns.scores import scalars_between

# Operations allowed between the scores and the softmax, and between the softmax and its product
# with the values.
_SCORE_OPS = (
    VIEWS
    | ARITHMETIC
    | frozenset(
        "masked_fill masked_fill_ tanh clamp max min maximum amax nan_to_num add_ softmax module "
        "pad as_strided".split()
    )
)


def match_attention(node: fx.Node, root: nn.Module) -> list[Match]:
    """Return the attention whose core (a softmax, or a call that contains it) is ``node``.

    The result is empty if there is none, and has a match for each stream of tokens with
    projections of its own.
    """
    if node.meta.get("attention"):
        return _from_call(node, root, first=1)
    name = op_name(node)
    if name == "scaled_dot_product_attention":
        return _from_call(node, root, first=0)
    if name == "apply" and rows_sum_to_one(value(node)):  # a softmax as an autograd function
        found = _from_softmax(node, root)
        for each in found:
            each.missing["lse"] = "its softmax is inside an autograd function of its own"
        return found
    return _from_softmax(node, root) if name == "softmax" or _written_by_hand(node) else []


def _written_by_hand(node: fx.Node) -> bool:
    """Whether a node is ``exp(x - logsumexp(x))``, a softmax written by hand."""
    shifted = node.args[0] if op_name(node) == "exp" and node.args else None
    if not isinstance(shifted, fx.Node) or op_name(shifted) != "sub":
        return False
    return isinstance(shifted.args[1], fx.Node) and op_name(shifted.args[1]) == "logsumexp"


def _from_call(node: fx.Node, root: nn.Module, first: int) -> list[Match]:
    """Return the attention of one call, whose query is argument number ``first``.

    With ``first = 1`` it is a library's ``(module, query, key, value, attention_mask, ...)``, which
    returns (context, weights); with ``first = 0`` it is SDPA.
    """
    names = ("query", "key", "value", "attention_mask" if first else "attn_mask")
    given: dict[str, Any] = dict(zip(names, node.args[first:], strict=False)) | dict(node.kwargs)
    heads = [given.get(n) for n in names[:3]]
    if not all(isinstance(h, fx.Node) for h in heads):
        return []
    scale = given.get("scaling" if first else "scale")
    context: fx.Node = node
    ports: dict[str, PortNode] = {}
    if first:
        parts = {u.args[1]: u for u in node.users if op_name(u) == "getitem"}
        context = parts.get(0, node)
        if isinstance(value(parts.get(1)), Tensor):
            ports |= {name: PortNode(parts[1]) for name in ("weights", "scores")}  # of one shape
    mask = given.get(names[3])
    if isinstance(mask, fx.Node) and isinstance(value(mask), Tensor):
        ports["mask"] = PortNode(mask)
    query, key, val = (h for h in heads if isinstance(h, fx.Node))
    if not _contracts_features(query, root):
        return []
    found = assemble(node, root, query, key, val, context, ports, _float(scale))
    window = _float(given.get("sliding_window"))
    for each in found:
        each.softcap = _float(given.get("softcap"))
        each.window = None if window is None else int(window)
    return found


def _from_softmax(node: fx.Node, root: nn.Module) -> list[Match]:
    """Return the attention around a softmax; nothing if it is not one."""
    scores = next((n for n in node.all_input_nodes if is_activation(n)), None)
    if scores is None or value(scores).dim() < 3:
        return []
    product = _product_behind(scores, root)
    if product is None:
        return []
    operands = [n for n in product.all_input_nodes if is_activation(n)]
    if op_name(product) == "baddbmm":
        operands = operands[-2:]
    later = [node, *walk_forward(node, lambda n: op_name(n) in _SCORE_OPS)]
    weighted_sum = next((n for n in later if op_name(n) in PRODUCTS), None)
    if weighted_sum is None:
        return []
    values = [n for n in weighted_sum.all_input_nodes if is_activation(n) and n not in later]
    if not values:
        return []
    query, key = operands[0], _untransposed(operands[1], operands[0])
    if is_transposed(product, scores):
        query, key = _untransposed(operands[1], operands[0]), operands[0]
    if op_name(product) != "einsum" and not _contracts_features(query, root):
        return []
    weights = next(n for n in weighted_sum.all_input_nodes if n in later)
    if not _sums_over_normalised_axis(node, weights, weighted_sum):
        return []
    order = _einsum_order(product, query)
    found = assemble(
        node, root, query, key, values[0], weighted_sum,
        {"weights": PortNode(weights), "scores": PortNode(scores)},
        scalars_between(flow(product, scores)), order,
    )  # fmt: skip
    caps = [n for n in flow(product, scores) if op_name(n) == "tanh"]
    rows = value(query).permute(order) if order else value(query)
    talking = any(_mixes_heads(n, scores, root) for n in (*flow(product, scores), *later))
    for each in found:
        each.softmax_input = scores
        if talking:
            each.missing["lse"] = "projections mix the scores of its heads (talking heads)"
        _set_orders(each, product, weighted_sum, key is operands[1])
        each.softcap = scalars_between(flow(caps[-1], scores)) if caps else None
        each.nodes += [*flow(product, node), *flow(node, weighted_sum)]
        if value(scores).shape[:-1].numel() != rows.shape[:-1].numel():
            each.missing.setdefault("lse", "rows of its softmax are not those of its query heads")
    return found


def _set_orders(found: Match, product: fx.Node, weighted_sum: fx.Node, transposed: bool) -> None:
    """Note the axis orders of keys and values that are not (..., m, d).

    ``transposed``: the key node itself is the right operand of the product, (..., d, m).
    """
    key, val = (found.ports[name].node for name in ("key_heads", "value_heads"))
    axes = tuple(range(value(key).dim()))
    orders: dict[str, tuple[int, ...] | None] = {}
    if op_name(product) == "einsum":
        orders["key_heads"] = _einsum_order(product, key)
    elif transposed:  # the graph has no node in which the keys are (..., m, d)
        orders["key_heads"] = (*axes[:-2], axes[-1], axes[-2])
        if len(axes) == 3:  # (B H, d, m): one key head for each query head
            found.kv_heads = found.heads
    if op_name(weighted_sum) == "einsum" and einsum_letters(weighted_sum)[0]:
        # The order puts the summed axis, the m keys, at the end.
        last = _einsum_order(weighted_sum, val) or tuple(range(value(val).dim()))
        orders["value_heads"] = (*last[:-2], last[-1], last[-2])
    elif op_name(weighted_sum) != "einsum" and not weights_come_first(found):
        axes = tuple(range(value(val).dim()))  # V (..., d, m) times the transposed weights
        orders["value_heads"] = (*axes[:-2], axes[-1], axes[-2])
    found.head_orders = {name: order for name, order in orders.items() if order is not None}


def _sums_over_normalised_axis(softmax: fx.Node, weights: fx.Node, weighted_sum: fx.Node) -> bool:
    """Whether the product with the values sums over the axis that the softmax normalised."""
    given = [a for a in (*softmax.args[1:2], softmax.kwargs.get("dim")) if isinstance(a, int)]
    if not given or op_name(weighted_sum) == "einsum" or op_name(softmax) != "softmax":
        return True
    shape = value(softmax).shape
    numbers = torch.arange(shape[given[0]], dtype=torch.int32)
    numbers = numbers.reshape([-1 if i == given[0] % len(shape) else 1 for i in range(len(shape))])
    found = propagate_labels(softmax, numbers.expand(shape), weights)
    operands = [n for n in weighted_sum.all_input_nodes if is_activation(n)]
    axis = -1 if weights is operands[-2] else -2
    return found is None or found.shape[axis] < 2 or varies(found, axis)


def _einsum_order(product: fx.Node, query: fx.Node) -> tuple[int, ...] | None:
    """Return the order of axes that makes an operand of an einsum (..., n, d), or None.

    The axes that the scores keep come first, in the order of the scores; the summed one is last.
    """
    if op_name(product) != "einsum":
        return None
    operand_letters, result = einsum_letters(product)
    operands = [n for n in product.args[1:] if isinstance(n, fx.Node)]
    if not operand_letters or query not in operands:
        return None
    letters = operand_letters[operands.index(query)]
    wanted = "".join(x for x in result if x in letters) + "".join(
        x for x in letters if x not in result
    )
    order = tuple(letters.index(x) for x in wanted)
    return None if order == tuple(range(len(order))) else order


def _contracts_features(query: fx.Node, root: nn.Module) -> bool:
    """Whether the last axis of the query heads has features; in channel attention it has tokens."""
    ends, _, _ = walk_back(query, root, partial(may_precede_heads, root))
    if not ends:
        return True
    found = propagate_labels(ends[0].node, features(ends[0]), query)
    return found is None or found.shape[-1] < 2 or varies(found, -1)


def _product_behind(scores: fx.Node, root: nn.Module) -> fx.Node | None:
    """Return the product of two activations from which scores are computed, or None.

    Of several, the one in the nearest module counts, and there the first: scores of an earlier
    layer, or of relative positions, are added to its own.
    """
    queue, seen = [scores], {scores}
    found: list[fx.Node] = []
    while queue:
        node = queue.pop(0)
        if op_name(node) in PRODUCTS:
            operands = [n for n in node.all_input_nodes if is_activation(n)]
            if len(operands) >= 2 and not any(is_parameter(n) for n in operands):
                found.append(node)
            continue
        stops = projection(node, root) and not _mixes_heads(node, scores, root)
        if forwarded(node) is None and (op_name(node) not in _SCORE_OPS or stops):
            continue
        for source in inputs(node):
            if _carries_scores(source) and source not in seen:
                seen.add(source)
                queue.append(source)
    if not found:
        return None
    order = {n: i for i, n in enumerate(scores.graph.nodes)}
    return min(found, key=lambda n: (-_shared_path(n, scores), order[n]))


def _shared_path(a: fx.Node, b: fx.Node) -> int:
    """Return how many modules, from the root on, contain both nodes."""
    paths = (str(n.meta["owner"]).split(".") for n in (a, b))
    same = takewhile(lambda pair: pair[0] == pair[1], zip(*paths, strict=False))
    return len(list(same))


def _mixes_heads(node: fx.Node, scores: fx.Node, root: nn.Module) -> bool:
    """Whether a node projects all heads' scores to all heads' scores (talking heads).

    The heads are an axis of the scores in any place.
    """
    found = projection(node, root)
    if found is None or found.in_width != found.width:
        return False
    return sorted(value(node).shape) == sorted(value(scores).shape)


def _carries_scores(node: fx.Node) -> bool:
    """Whether scores may come through a node: an activation, or a tuple that holds one."""
    return is_activation(node) or isinstance(value(node), tuple)


def _untransposed(key: fx.Node, query: fx.Node) -> fx.Node:
    """Return the key heads (..., m, d) before the transposition that the product needs."""
    if op_name(key) in ("transpose", "permute", "mT", "swapaxes"):
        before = key.all_input_nodes[0]
        again = value(key).mT  # a permutation may do more: (B, m, G, d) to (B, G, d, m)
        same = again.shape == value(before).shape and again.stride() == value(before).stride()
        if same and again.shape[-1] == value(query).shape[-1]:
            return before
    return key


def _float(x: Any) -> float | None:
    """Return an argument or a node's value as a float, None if it is not a number."""
    x = value(x) if isinstance(x, fx.Node) else x
    return float(x) if isinstance(x, (int, float)) else None
