"""Add virtual keys and values to a computed attention, without concatenating them to its own.

    softmax([s_P ; S]) [P_v ; V] = (1 - g) f + g softmax(s_P) P_v        g = sigmoid(lse_P - lse)

s_P (P scores per query) and S are scaled scores, f = softmax(S) V, lse = logsumexp(S) and
lse_P = logsumexp(s_P). The identity is exact (Chen et al. 2022, arXiv:2210.14469, section 3).
Therefore the model's own attention computes f and lse as before: its mask, its cache and its fused
kernel stay unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from surgery.attention import few_keys
from surgery.attention.math_path import normalised
from surgery.attention.sdpa import attention


def virtual_tokens(
    merged: Tensor,
    query: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    scores: Callable[[Tensor], Tensor] | None = None,
    gate: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return the merged heads with P virtual keys and values: ``f' = f + g (context_P - f)``.

    Args:
        merged: f, heads side by side (B, n, H d_v).
        query: query heads as the model scores them (B, H, n, d).
        lse: logsumexp of the model's own scores (B, H, n).
        keys, values: (G, P, d) and (G, P, d_v), G dividing H.
        scale: the factor of the model's own scores.
        scores: a function applied to s_P (B, H, n, P), for methods that change virtual scores.
        gate: a factor of g for each head (H,); None is 1.
        softcap: that of the site; s_P become softcap tanh(s_P / softcap), after ``scores``.

    Returns:
        f' (B, n, H d_v), to take the place of ``merged``.

    Cost: 2 n P (d + d_v) operations per head.

    Example:
        ``surgery.virtual_tokens(merged, query, lse, keys, values, scale=8**-0.5)``
    """
    f = _split(merged, query.shape[1])
    plain = scores is None and gate is None and softcap is None
    if plain and few_keys.serves(query, lse, f, keys, values):
        return _merge(few_keys.add_few_keys(f, query, lse, keys, values, scale))
    context, lse_p = _attend_virtual(query, keys, values, lse, scale, scores, softcap)
    g = torch.sigmoid(lse_p - lse).unsqueeze(-1)  # (B, H, n, 1)
    if gate is not None:
        g = g * gate.view(-1, 1, 1)
    if not context.dtype == g.dtype == f.dtype:
        context, g = context.to(f.dtype), g.to(f.dtype)
    return _merge(torch.lerp(f, context, g))


def virtual_lse(
    query: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    scores: Callable[[Tensor], Tensor] | None = None,
    gate: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return the logsumexp (B, H, n) of all scores, the model's own and the virtual ones.

    The arguments are those of :func:`virtual_tokens`. With a gate, the result is
    ``lse - log(1 - gate g)``: the logsumexp with which an ungated softmax gives the same f'.

    Example:
        ``surgery.virtual_lse(query, lse, keys, values, scale=8**-0.5)``
    """
    lse_p = _attend_virtual(query, keys, values, lse, scale, scores, softcap)[1]
    if gate is None:
        return torch.logaddexp(lse, lse_p)
    return lse - torch.log1p(-torch.sigmoid(lse_p - lse) * gate.view(-1, 1).to(lse.dtype))


def _attend_virtual(
    query: Tensor, keys: Tensor, values: Tensor, lse: Tensor, scale: float,
    scores: Callable[[Tensor], Tensor] | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to the virtual keys alone: context_P (B, H, n, d_v) and lse_P (B, H, n)."""
    batch, heads = query.shape[:2]
    bent = scores is not None or softcap is not None
    if not bent and not _few_keys(query, keys, lse):  # plain attention: a fused kernel serves
        keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
        grouped = heads != keys.shape[1]
        result: tuple[Tensor, Tensor] = attention(
            query, keys, values, scale=scale, enable_gqa=grouped
        )
        return result
    if heads != len(keys):
        keys, values = (x.repeat_interleave(heads // len(x), 0) for x in (keys, values))
    s = (query @ (keys.mT * scale)).to(lse.dtype)  # (B, H, n, P)
    s = s if scores is None else scores(s)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    weights, lse_p = normalised(s, finite=True)
    return weights.to(values.dtype) @ values, lse_p


def _few_keys(query: Tensor, keys: Tensor, lse: Tensor) -> bool:
    """Whether training on a CPU is faster without a fused kernel, because there are few keys.

    A fused backward computes the weights again, to save memory. The weights of a few keys take
    little memory, so keeping them is faster.
    """
    exact = query.dtype == lse.dtype and not torch.is_autocast_enabled("cpu")
    return torch.is_grad_enabled() and query.is_cpu and exact and keys.shape[-2] <= few_keys.FEW


def _split(merged: Tensor, heads: int) -> Tensor:
    """Split heads, (B, n, H d) -> (B, H, n, d). With n = 1 this is a view, without a transpose."""
    if merged.shape[1] == 1:
        return merged.view(len(merged), heads, 1, -1)
    return torch.unflatten(merged, -1, (heads, -1)).transpose(1, 2)


def _merge(heads: Tensor) -> Tensor:
    """Lay heads side by side, (B, H, n, d) -> (B, n, H d)."""
    if heads.shape[2] == 1:
        return heads.reshape(len(heads), 1, -1)
    return heads.transpose(1, 2).flatten(2)
