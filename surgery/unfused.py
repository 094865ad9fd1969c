"""Unfused: SDPA's plain path, operation by operation, so that its scores are there to be read.

Where SDPA has no fused kernel (dropout on a CPU, a mask that needs gradient) it multiplies queries
and keys, adds the mask, and normalises. Doing the same here gives the same bits and the same random
draws, and the logsumexp of the scores beside them, for one pass over the scores instead of a second
product. That it is the same is tried out before it is used the first time.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class _Logsumexp(torch.autograd.Function):
    """Logsumexp of scores whose softmax is known: its gradient is that softmax.

    The largest weight of a row is ``exp(largest score - lse)``, so no exponential is taken again.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        if scores.shape[-1] == 0:
            return scores.new_full(scores.shape[:-1], float("-inf"))
        top = scores.amax(-1)
        return (top - weights.amax(-1).log()).masked_fill(top == float("-inf"), float("-inf"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return weights * grads[0].unsqueeze(-1), None


def lse_of(scores: Tensor, weights: Tensor) -> Tensor:
    """Logsumexp of scores (..., m) whose softmax is ``weights``: (...); -inf where all are."""
    lse: Tensor = _Logsumexp.apply(scores, weights)  # type: ignore[no-untyped-call]
    return lse


def unfused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Context and logsumexp; the arguments are SDPA's, with as many heads of keys as of queries."""
    root = math.sqrt(scale)
    scores = (query * root) @ (key.transpose(-2, -1) * root)  # (B, H, n, m)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    if mask is not None:
        scores = scores + mask
    weights = torch._safe_softmax(scores, -1)
    lse = lse_of(scores, weights)
    dropped = F.dropout(weights, dropout) if dropout > 0 else weights
    return dropped @ value, lse


@functools.cache
def same_as_sdpa(dtype: torch.dtype, dropout: bool, masked: bool, is_causal: bool) -> bool:
    """Does :func:`unfused` give the bits of SDPA's plain path, and leave the same random state?"""
    with _disable_current_modes():  # it may be asked while torch.compile looks on
        return _same(dtype, dropout, masked, is_causal)


def _same(dtype: torch.dtype, dropout: bool, masked: bool, is_causal: bool) -> bool:
    wave = torch.arange(2 * 3 * 5 * 8, dtype=torch.float32)
    q, k, v = ((wave * a).sin().reshape(2, 3, 5, 8).to(dtype) for a in (0.7, 1.3, 0.3))
    mask = torch.zeros(5, 5, dtype=dtype).masked_fill(torch.ones(5, 5).triu(2) > 0, float("-inf"))
    options = (mask if masked else None, 0.5 if dropout else 0.0, is_causal)
    found = []
    with torch.random.fork_rng([]), torch.no_grad():
        for ours in (True, False):
            torch.manual_seed(0)
            if ours:
                context = unfused(q, k, v, *options, 1 / math.sqrt(8))[0]
            else:
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    context = F.scaled_dot_product_attention(q, k, v, *options)
            found.append((context, torch.rand(1)))
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))
