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


class _Normalised(torch.autograd.Function):
    """Softmax and logsumexp of scores, with one gradient for both.

    The largest weight of a row is ``exp(largest score - lse)``, so no exponential is taken again;
    the gradient of the logsumexp is the softmax.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, finite: bool) -> tuple[Tensor, Tensor]:
        weights = scores.softmax(-1) if finite else torch._safe_softmax(scores, -1)
        ctx.save_for_backward(weights)
        ctx.set_materialize_grads(False)
        if scores.shape[-1] == 0:
            return weights, scores.new_full(scores.shape[:-1], float("-inf"))
        top = scores.amax(-1)
        lse = top - weights.amax(-1).log()
        return weights, lse.masked_fill_(top == float("-inf"), float("-inf"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        (weights,) = ctx.saved_tensors
        of_weights, of_lse = grads
        if of_weights is None:
            return None if of_lse is None else weights * of_lse.unsqueeze(-1), None
        made: Tensor = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        return made if of_lse is None else made.addcmul_(weights, of_lse.unsqueeze(-1)), None


def normalised(scores: Tensor, finite: bool = False) -> tuple[Tensor, Tensor]:
    """Softmax (..., m) of scores (..., m), and their logsumexp (...).

    Where all scores are -inf, the softmax is 0 and the logsumexp -inf; ``finite`` scores need no
    look for such rows.
    """
    made: tuple[Tensor, Tensor] = _Normalised.apply(scores, finite)  # type: ignore[no-untyped-call]
    return made


def math_path(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Context and logsumexp; the arguments are SDPA's, with as many heads of keys as of queries."""
    # The scores have no name here: their memory is free, and near, when the dropout wants some.
    weights, lse = normalised(_scores(query, key, mask, is_causal, math.sqrt(scale)))
    dropped = F.dropout(weights, dropout) if dropout > 0 else weights
    return dropped @ value, lse


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, root: float
) -> Tensor:
    """(B, H, n, m), masked."""
    scores = (query * root) @ (key.transpose(-2, -1) * root)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    return scores if mask is None else scores.add_(mask)


@functools.cache
def math_path_agrees(dtype: torch.dtype, dropout: bool, masked: bool, is_causal: bool) -> bool:
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
                context = math_path(q, k, v, *options, 1 / math.sqrt(8))[0]
            else:
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    context = F.scaled_dot_product_attention(q, k, v, *options)
            found.append((context, torch.rand(1)))
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))
