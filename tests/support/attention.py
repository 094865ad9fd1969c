"""Attention by loops over its equations, with the tensors and masks of tests."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

INF = float("inf")


def heads(
    n: int, m: int, h: int = 2, g: int = 2, d: int = 4, b: int = 2, dtype: Any = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query (b, h, n, d), key and value (b, g, m, d), the same at every call."""
    generator = torch.Generator().manual_seed(n + 31 * m)
    shapes = ((b, h, n, d), (b, g, m, d), (b, g, m, d))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return q, k, v


def holes(n: int, m: int, b: int = 2) -> Tensor:
    """A boolean mask (b, 1, n, m) in which every query sees key 0 and some others."""
    seen = torch.rand(b, 1, n, m, generator=torch.Generator().manual_seed(n * m)) > 0.4
    seen[..., 0] = True
    return seen


def additive(seen: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The additive form of a boolean mask."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -INF)


def masks(n: int, m: int) -> dict[str, dict[str, Any]]:
    """Options of SDPA, by what they do."""
    smooth = torch.linspace(-2, 2, n * m, dtype=torch.float64).reshape(1, 1, n, m)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": holes(n, m)},
        "additive": {"attn_mask": additive(holes(n, m)) + smooth},
        "scaled": {"scale": 0.3},
    }


MASKS = sorted(masks(1, 1))


def by_loop(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """S = scale Q K^T + M; softmax(S) V and log sum exp S, one number at a time."""
    (b, h, n, d), (g, m) = q.shape, k.shape[1:3]
    context, lse = q.new_zeros(b, h, n, v.shape[-1]), q.new_zeros(b, h, n)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(b, h, n, m)
    for x, y, i in ((x, y, i) for x in range(b) for y in range(h) for i in range(n)):
        group = y * g // h
        scores = []
        for j in range(m):
            s = float(q[x, y, i] @ k[x, group, j]) * (d**-0.5 if scale is None else scale)
            if is_causal and j > i:
                s = -INF
            elif attn_mask is not None and attn_mask.dtype == torch.bool:
                s = s if attn_mask[x, y, i, j] else -INF
            elif attn_mask is not None:
                s += float(attn_mask[x, y, i, j])
            scores.append(s)
        top = max(scores)
        if top == -INF:
            lse[x, y, i] = -INF
            continue
        total = sum(math.exp(s - top) for s in scores)
        lse[x, y, i] = top + math.log(total)
        for j, s in enumerate(scores):
            context[x, y, i] += math.exp(s - top) / total * v[x, group, j]
    return context, lse
