"""Read how a model scores queries and keys: rotary encoding, scale and causality."""

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
    """Return the query heads before a rotary encoding, or ``end`` if there is none.

    Between the projection ``start`` and the heads ``end``, a rotary encoding begins at the first
    operation with a tensor that is neither a parameter nor computed from the projection: the
    cosines. The heads before it are the last *waist* in front of that operation: a node through
    which everything flows, in the shape of the heads and the dtype of the projection. A rotation
    may split the heads before the cosines come in; the halves are not waists.
    """
    region = flow(start, end)
    position = {node: i for i, node in enumerate(region)}
    first_mixing = next(
        (i for i, n in enumerate(region) if i and _brings_in_activation(n, position)),
        None,
    )
    if first_mixing is None:
        return end
    furthest, waist, dtype = 0, start, value(start).dtype
    for i, node in enumerate(region[:first_mixing]):
        example = value(node)
        if furthest <= i and _like_heads(example, value(end)) and example.dtype == dtype:
            waist = node  # a cast to float32 belongs to the rotation
        furthest = max([furthest, *(position[u] for u in node.users if u in position)])
    return waist if _like_heads(value(waist), value(end)) else end


def stretch(before: Tensor, after: Tensor) -> tuple[float, ...]:
    """Return the factor of each feature's products under a rotary encoding, (d,); empty if all 1.

    A rotation keeps the length of a query. Some encodings also scale the rotated features of
    queries and keys, by sqrt(1/t) (YaRN; Peng et al. 2023, arXiv:2309.00071, eq. 22). Then the
    factor of a product is 1/t, and so is that of a query's squared length, which is measured here.

    Args:
        before, after: query heads (..., d) in front of the encoding and behind it.
    """
    if before is after or before.is_meta or before.shape != after.shape:
        return ()
    a, b = before.double(), after.double()
    rotated = (a != b).flatten(0, -2).any(0)
    ratio = b[..., rotated].square().sum(-1) / a[..., rotated].square().sum(-1)  # of each token
    bound = 0.05 if before.dtype in (torch.float16, torch.bfloat16) else 1e-3
    mean = float(ratio.mean()) if ratio.numel() else 1.0
    if not bool(((ratio - mean).abs() < bound).all()) or abs(mean - 1) < bound:
        return ()  # not one factor for all tokens: more than a scaled rotation
    return tuple(torch.where(rotated, mean, 1.0).tolist())


def slopes(scores: Tensor, query: Tensor, key: Tensor, scale: float) -> tuple[float, ...]:
    """Return the s_h of a model that adds ``s_h j`` to the scaled scores of key j; empty if none.

    Press et al. 2021, arXiv:2108.12409. The last query of the first example is measured.

    Args:
        As for :func:`added_to_scores`.
    """
    measured = added_to_scores(scores, query, key, scale)
    if measured is None:
        return ()
    added, bound = (x[:, -1] for x in measured)
    found = (added[:, -1] - added[:, 0]) / (added.shape[-1] - 1)
    line = found[:, None] * torch.arange(added.shape[-1], device=added.device)
    linear = bool(((added - line).abs() < bound).all()) and bool((found > 10 * bound.max()).all())
    return tuple(found.tolist()) if linear else ()


def added_to_scores(
    scores: Tensor, query: Tensor, key: Tensor, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Return what a model adds to ``scale Q K^T`` of the first example, and how exact that is.

    Args:
        scores: what the softmax is taken of, (B, H, n, m).
        query, key: heads (B, H, n, d) and (B, G, m, d), or with batch and heads as one axis.

    Returns:
        Two tensors (H, n, m); None if the shapes are others, or m < 3.
    """
    batch, count, n, m = scores.shape if scores.dim() == 4 else (0, 0, 0, 0)
    alike = query.shape[-2] == n and key.shape[-2] == m and key.shape[-1] == query.shape[-1]
    whole = batch * count * n * query.shape[-1] == query.numel()
    if scores.is_meta or m < 3 or not alike or not whole:
        return None
    if key.numel() % (batch * m * key.shape[-1]):
        return None
    heads = query.reshape(batch, count, n, -1)[0].double()
    groups = key.reshape(batch, -1, m, key.shape[-1])[0].double()
    if count % len(groups):
        return None
    keys = groups.repeat_interleave(count // len(groups), 0)
    plain = scale * torch.einsum("hnd,hmd->hnm", heads, keys)
    unit = 2e-2 if scores.dtype in (torch.float16, torch.bfloat16) else 1e-5
    return scores[0].double() - plain, unit * (1 + plain.abs())


def _like_heads(x: Any, heads: Tensor) -> bool:
    """Whether a value is a floating-point tensor in the shape of ``heads``."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.shape == heads.shape


def _brings_in_activation(node: fx.Node, position: dict[fx.Node, int]) -> bool:
    """Whether a node combines the flow with an activation from outside, such as cosines."""
    others = [n for n in node.all_input_nodes if n not in position and not from_parameters(n)]
    return op_name(node) in ("mul", "einsum", "where", "matmul", "addcmul") and any(
        map(is_activation, others)
    )


def causal(weights: Tensor) -> bool:
    """Whether no query sees a later key.

    Args:
        weights: attention weights, or a mask that is 0 where a key is hidden, (..., n, m). The last
            query stands at the last key.
    """
    n, m = weights.shape[-2:]
    if weights.is_meta or n < 2:
        return False
    later = torch.ones(n, m, dtype=torch.bool, device=weights.device).triu(m - n + 1)
    return bool((weights[..., later] == 0).all()) if later.any() else False


def scalars_between(nodes: Iterable[fx.Node]) -> float:
    """Return the product of the numbers by which the given nodes multiply or divide.

    A number is a Python constant, a captured number, or a tensor without axes. An infinite one,
    as in masks, does not count.
    """
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
