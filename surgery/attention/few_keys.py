"""Add a few virtual keys to a computed attention in the fewest operators, forward and backward.

    w = softmax([scale Q P_k^T ; lse])          (B, H, n, P + 1)
    f' = w_P P_v + w_last f                     w_P the first P weights, w_last the last

The own keys count as one more key, whose score is their logsumexp lse and whose value is their
context f. Then w_last = 1 - g and w_P = g softmax(scale Q P_k^T), in the letters of
virtual_keys.py, so no logsumexp of the virtual scores is needed. The weights are kept for the
backward pass: with a few keys they take little memory.

    df = w_last dO                    dP_v = w_P^T dO
    dS = softmax'([dO P_v^T ; rowsum(dO o f)])
    dQ = scale dS_P P_k               dP_k = scale dS_P^T Q               dlse = dS_last

The products run once for each of the G heads of keys, over all queries that read it: no key is
repeated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.attention.transforms import transformed

FEW = 128


def serves(query: Tensor, lse: Tensor, f: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether :func:`add_few_keys` computes this call exactly, and in fewer operators.

    It takes part in training on a CPU, with one dtype and without autocast. Transforms of
    ``torch.func``, forward-mode differentiation and ``torch.compile`` see plain operators alone.
    """
    if not query.is_cpu or not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or transformed():
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    same = query.dtype == lse.dtype == f.dtype == keys.dtype == values.dtype
    return same and keys.shape[-2] <= FEW


def add_few_keys(
    f: Tensor, query: Tensor, lse: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    """Return f' (B, H, n, d_v), the context with the virtual keys.

    Shape: f (B, H, n, d_v), query (B, H, n, d), lse (B, H, n), keys (G, P, d), values (G, P, d_v)
    """
    made: Tensor = _AddFewKeys.apply(f, query, lse, keys, values, scale)  # type: ignore[no-untyped-call]
    return made


class _AddFewKeys(torch.autograd.Function):
    """The arguments of :func:`add_few_keys` -> f'."""

    @staticmethod
    def forward(
        ctx: Any, f: Tensor, query: Tensor, lse: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        weights = _weights(query, lse, keys, scale)
        ctx.save_for_backward(f, query, lse, keys, values, weights)
        ctx.scale = scale
        context = _of_heads(weights[..., :-1] @ values, query)  # (B, G, H/G, n, d_v)
        last = _of_heads(weights[..., -1:], query)  # (B, G, H/G, n, 1)
        made = torch.empty_like(f)
        torch.addcmul(context, _split(f, keys), last, out=_split(made, keys))
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        f, query, lse, keys, values, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, which goes through the weights too
            weights = _weights(query, lse, keys, ctx.scale)
        groups = len(keys)
        wanted = ctx.needs_input_grad
        rows = _by_group(grad, groups)  # (G, N, d_v)
        df = None
        if wanted[0]:
            df = (_split(grad, keys) * _of_heads(weights[..., -1:], query)).flatten(1, 2)
        dv = weights[..., :-1].mT @ rows if wanted[4] else None
        own = (grad * f).sum(-1, keepdim=True)  # (B, H, n, 1)
        both = torch.cat([rows @ values.mT, _by_group(own, groups)], -1)  # (G, N, P + 1)
        scores = torch._softmax_backward_data(both, weights, -1, weights.dtype)
        virtual = scores[..., :-1]
        dq = dlse = None
        if wanted[1]:
            dq = _of_heads(_product(virtual, keys, ctx.scale), query).flatten(1, 2)
        if wanted[2]:
            dlse = _of_heads(scores[..., -1], query).flatten(1, 2)
        queries = _by_group(query, groups)
        dk = _product(virtual.mT, queries, ctx.scale) if wanted[3] else None
        return df, dq, dlse, dk, dv, None


def _weights(query: Tensor, lse: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return the softmax (G, N, P + 1) of the virtual scores and lse, N = B n H / G."""
    virtual = _product(_by_group(query, len(keys)), keys.mT, scale)
    own = _by_group(lse.unsqueeze(-1), len(keys))
    return torch.cat([virtual, own], -1).softmax(-1)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Lay together what belongs to one head of keys, (B, H, n, d) -> (G, N, d)."""
    return torch.unflatten(x, 1, (groups, x.shape[1] // groups)).transpose(0, 1).flatten(1, 3)


def _of_heads(x: Tensor, query: Tensor) -> Tensor:
    """Return a view of what :func:`_by_group` laid together, (G, N, d) -> (B, G, H/G, n, d)."""
    batch, heads, n = query.shape[:3]
    return torch.unflatten(x, 1, (batch, heads // len(x), n)).transpose(0, 1)


def _split(x: Tensor, keys: Tensor) -> Tensor:
    """Split the heads of queries by the heads of keys, (B, H, n, d) -> (B, G, H/G, n, d)."""
    return torch.unflatten(x, 1, (len(keys), x.shape[1] // len(keys)))


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return ``scale * left @ right`` of two stacks of matrices, in one operator."""
    ignored = left.new_empty(()).expand(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(ignored, left, right, beta=0, alpha=scale)
