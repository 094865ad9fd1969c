"""What is done to queries and keys on the way to their scores: rotation, scale, causality."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from surgery.patterns.dataflow import (
    flow,
    from_parameters,
    is_activation,
    op_name,
    value,
)


def before_rotation(start: fx.Node, end: fx.Node) -> fx.Node:
    """The query heads before a rotary encoding: the last waist of the flow before it is mixed.

    Between the projection ``start`` and the heads ``end``, a rotary encoding is the first place
    that brings in a tensor which is neither a parameter nor made from the projection. A waist is a
    node through which everything flows. Without a rotation this is ``end`` itself.
    """
    region = flow(start, end)
    position = {node: i for i, node in enumerate(region)}
    mixing = next(
        (i for i, n in enumerate(region) if i and _mixes(n, position)),
        None,
    )
    if mixing is None:
        return end
    furthest, waist, dtype = 0, start, value(start).dtype
    for i, node in enumerate(region[:mixing]):
        given = value(node)
        if furthest <= i and _like_heads(given, value(end)) and given.dtype == dtype:
            waist = node  # some cast to float32 only to rotate
        furthest = max([furthest, *(position[u] for u in node.users if u in position)])
    return waist if _like_heads(value(waist), value(end)) else end


def stretch(before: Tensor, after: Tensor) -> tuple[float, ...]:
    """By what a rotary encoding multiplies the products of each feature, (d,); empty if by 1.

    A rotation leaves them as they are. Some encodings stretch what they rotate, queries and keys
    alike (YaRN; Peng et al. 2023, arXiv:2309.00071, eq. 22).
    """
    if before is after or before.is_meta or before.shape != after.shape:
        return ()
    a, b = before.double(), after.double()
    turned = (a != b).flatten(0, -2).any(0)
    ratio = b[..., turned].square().sum(-1) / a[..., turned].square().sum(-1)  # of each token
    bound = 0.05 if before.dtype in (torch.float16, torch.bfloat16) else 1e-3
    mean = float(ratio.mean()) if ratio.numel() else 1.0
    if not bool(((ratio - mean).abs() < bound).all()) or abs(mean - 1) < bound:
        return ()  # something else is done to them, too
    return tuple(torch.where(turned, mean, 1.0).tolist())


def _like_heads(x: Any, heads: Tensor) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.shape == heads.shape


def _mixes(node: fx.Node, position: dict[fx.Node, int]) -> bool:
    others = [n for n in node.all_input_nodes if n not in position and not from_parameters(n)]
    return op_name(node) in ("mul", "einsum", "where", "matmul", "addcmul") and any(
        map(is_activation, others)
    )


def causal(weights: Tensor) -> bool:
    """Does no query see a later key, in these weights (..., n, m) or this mask of what is seen?"""
    n, m = weights.shape[-2:]
    if weights.is_meta or n < 2:
        return False
    later = torch.ones(n, m, dtype=torch.bool, device=weights.device).triu(m - n + 1)
    return bool((weights[..., later] == 0).all()) if later.any() else False


def scalars_between(nodes: Iterable[fx.Node]) -> float:
    """The product of the numbers that the given nodes multiply or divide by."""
    scale = 1.0
    for node in nodes:
        if op_name(node) == "baddbmm":
            alpha = node.kwargs.get("alpha", 1.0)
            scale *= float(value(alpha) if isinstance(alpha, fx.Node) else alpha)  # type: ignore[arg-type]
            continue
        numbers = [a for a in node.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
        others = [a for a in node.all_input_nodes if isinstance(value(a), (int, float))]
        number = numbers[0] if numbers else value(others[0]) if others else None
        tensors = [value(a) for a in node.all_input_nodes if isinstance(value(a), Tensor)]
        if (
            number is None
            and len(tensors) == 2
            and not tensors[1].is_meta
            and tensors[1].dim() == 0
        ):
            number = tensors[1].item()
        if number is None or math.isinf(number):
            continue
        if op_name(node) in ("mul", "rmul", "imul"):
            scale *= number
        elif op_name(node) in ("div", "truediv", "itruediv"):
            scale /= number
    return scale
