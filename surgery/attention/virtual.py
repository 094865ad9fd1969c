"""Virtual tokens: keys and values that every query attends to, without concatenating any.

    softmax([s_P ; S]) [P_v ; V] = (1 - g) f + g softmax(s_P) P_v        g = sigmoid(lse_P - lse)

s_P (P scores per query) and S are scaled scores, f = softmax(S) V, lse = logsumexp(S). The identity
is exact (Chen et al. 2022, arXiv:2210.14469, section 3), so a fused kernel can compute f and lse,
its mask and its cache as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
    """The merged heads with P virtual keys and values: ``f' = f + g (context_P - f)``.

    Args:
        merged: f, heads side by side (B, n, H d_v).
        query: query heads as they are scored (B, H, n, d).
        lse: logsumexp of their scores (B, H, n).
        keys, values: (G, P, d) and (G, P, d_v), G dividing H.
        scale: the factor of the model's own scores.
        scores: applied to s_P (B, H, n, P), for methods that bend them.
        gate: one factor of g for each head (H,).
        softcap: the model's own, of the site: s_P become softcap tanh(s_P / softcap).

    Returns:
        f' (B, n, H d_v), to take the place of ``merged``.
    """
    context, own = _attend(query, keys, values, lse, scale, scores, softcap)
    g = torch.sigmoid(own - lse).unsqueeze(-1)  # (B, H, n, 1)
    if gate is not None:
        g = g * gate.view(-1, 1, 1)
    f = _split(merged, query.shape[1])
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
    """The logsumexp (B, H, n) of all scores, those of virtual tokens among them.

    With a gate: what it would have to be for the same f', ``lse - log(1 - g)``.
    """
    own = _attend(query, keys, values, lse, scale, scores, softcap)[1]
    if gate is None:
        return torch.logaddexp(lse, own)
    return lse - torch.log1p(-torch.sigmoid(own - lse) * gate.view(-1, 1).to(lse.dtype))


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, lse: Tensor, scale: float,
    scores: Callable[[Tensor], Tensor] | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What real queries make of virtual keys alone: context and logsumexp."""
    batch, heads = query.shape[:2]
    bent = scores is not None or softcap is not None
    if not bent and not _few(query, keys, lse):  # attention of virtual keys alone: a fused kernel
        keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
        grouped = heads != keys.shape[1]
        made: tuple[Tensor, Tensor] = attention(
            query, keys, values, scale=scale, enable_gqa=grouped
        )
        return made
    if heads != len(keys):
        keys, values = (x.repeat_interleave(heads // len(x), 0) for x in (keys, values))
    s = (query @ (keys.mT * scale)).to(lse.dtype)  # (B, H, n, P)
    s = s if scores is None else scores(s)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    weights, own = normalised(s, finite=True)
    return weights.to(values.dtype) @ values, own


def _few(query: Tensor, keys: Tensor, lse: Tensor) -> bool:
    """Are there so few keys that a CPU is faster, with gradients, without a fused kernel?

    The kernel's backward does without the weights and makes them again; 20 of a query are no load.
    """
    exact = query.dtype == lse.dtype and not torch.is_autocast_enabled("cpu")
    return torch.is_grad_enabled() and query.is_cpu and exact and keys.shape[-2] <= 128


def _split(merged: Tensor, heads: int) -> Tensor:
    """(B, n, H d) -> (B, H, n, d), which are the same numbers in one order if n = 1."""
    if merged.shape[1] == 1:
        return merged.view(len(merged), heads, 1, -1)
    return torch.unflatten(merged, -1, (heads, -1)).transpose(1, 2)


def _merge(heads: Tensor) -> Tensor:
    """(B, H, n, d) -> (B, n, H d)."""
    if heads.shape[2] == 1:
        return heads.reshape(len(heads), 1, -1)
    return heads.transpose(1, 2).flatten(2)
