"""Repeat the operations of SDPA's unfused math path, and take the logsumexp from its scores.

Where SDPA has no fused kernel (dropout on a CPU, a mask that needs a gradient), it multiplies
queries and keys, adds the mask, and normalises. The same operations here give the same bits and
draw the same random numbers. The scores are at hand, so the logsumexp costs one pass over them
instead of a second product.

A release of torch may change its math path. Therefore :func:`math_path_agrees` compares the two on
a small problem, once per process and kind of call, before :func:`math_path` is used.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from surgery.attention.transforms import transformed


class _Normalised(torch.autograd.Function):
    """Softmax and logsumexp of scores, with one backward for both.

    The largest weight of a row is ``exp(largest score - lse)``, so lse follows from the softmax
    without another exponential per score. The gradient of the logsumexp is the softmax.
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
        grad_weights, grad_lse = grads
        if grad_weights is None:
            return None if grad_lse is None else weights * grad_lse.unsqueeze(-1), None
        grad: Tensor = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        return grad if grad_lse is None else grad.addcmul_(weights, grad_lse.unsqueeze(-1)), None


def normalised(scores: Tensor, finite: bool = False) -> tuple[Tensor, Tensor]:
    """Return the softmax (..., m) of scores (..., m), and their logsumexp (...).

    In a row in which every score is -inf, the softmax is 0 and the logsumexp -inf. ``finite``
    promises that there is no such row, which saves the search for one.
    """
    if transformed():
        return torch._safe_softmax(scores, -1), scores.logsumexp(-1)
    result: tuple[Tensor, Tensor] = _Normalised.apply(scores, finite)  # type: ignore[no-untyped-call]
    return result


def math_path(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute context and logsumexp; the arguments are SDPA's, with G = H.

    Shape: query (B, H, n, d), key (B, H, m, d), value (B, H, m, d_v)
        -> context (B, H, n, d_v), lse (B, H, n)
    Cost: O(n m) memory per head.
    """
    # No local variable holds the scores, so dropout can reuse their memory while it is in cache.
    weights, lse = normalised(_scores(query, key, mask, is_causal, math.sqrt(scale)))
    dropped = F.dropout(weights, dropout) if dropout > 0 else weights
    return dropped @ value, lse


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, root_scale: float
) -> Tensor:
    """Return the masked scores (B, H, n, m); each side is scaled by ``root_scale``, as in SDPA."""
    scores = (query * root_scale) @ (key.transpose(-2, -1) * root_scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    return scores if mask is None else scores.add_(mask)


@functools.cache
def math_path_agrees(dtype: torch.dtype, dropout: bool, masked: bool, is_causal: bool) -> bool:
    """Whether :func:`math_path` gives the bits of SDPA's, and leaves the same random state."""
    # Real tensors also under torch.compile, and nothing that torch.export records.
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return _agrees_on_a_small_problem(dtype, dropout, masked, is_causal)


def _agrees_on_a_small_problem(
    dtype: torch.dtype, dropout: bool, masked: bool, is_causal: bool
) -> bool:
    wave = torch.arange(2 * 3 * 5 * 8, dtype=torch.float32)
    q, k, v = ((wave * a).sin().reshape(2, 3, 5, 8).to(dtype) for a in (0.7, 1.3, 0.3))
    mask = torch.zeros(5, 5, dtype=dtype).masked_fill(torch.ones(5, 5).triu(2) > 0, float("-inf"))
    options = (mask if masked else None, 0.5 if dropout else 0.0, is_causal)
    results = []
    with torch.random.fork_rng([]), torch.no_grad():
        for ours in (True, False):
            torch.manual_seed(0)
            if ours:
                context = math_path(q, k, v, *options, 1 / math.sqrt(8))[0]
            else:
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    context = F.scaled_dot_product_attention(q, k, v, *options)
            results.append((context, torch.rand(1)))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))
