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

from surgery.core import attention


def virtual_tokens(
    merged: Tensor,
    query: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    scores: Callable[[Tensor], Tensor] | None = None,
    gate: Tensor | None = None,
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

    Returns:
        f' (B, n, H d_v), to take the place of ``merged``.
    """
    batch, heads, n, _ = query.shape
    f = merged.reshape(batch, n, heads, -1)
    if scores is None:  # real queries attend to virtual keys: by a fused kernel
        own_keys, own_values = (x.expand(batch, -1, -1, -1) for x in (keys, values))
        grouped = heads != keys.shape[0]
        context, own = attention(query, own_keys, own_values, scale=scale, enable_gqa=grouped)
        g = torch.sigmoid(own - lse).mT.unsqueeze(-1).to(f.dtype)  # (B, n, H, 1)
        if gate is not None:
            g = g * gate.to(f.dtype).unsqueeze(-1)
        made = torch.lerp(f, context.transpose(1, 2).to(f.dtype), g)
    else:
        if heads != keys.shape[0]:
            keys, values = (x.repeat_interleave(heads // len(x), 0) for x in (keys, values))
        s = scores((query @ keys.mT * scale).to(lse.dtype))  # (B, H, n, P)
        both = torch.cat([s, lse.unsqueeze(-1)], -1).softmax(-1)  # g softmax(s_P), and 1 - g
        own_weights = both[..., :-1].to(values.dtype)
        g = own_weights.sum(-1).mT.unsqueeze(-1)
        changed = (own_weights @ values).transpose(1, 2).to(f.dtype) - g.to(f.dtype) * f
        made = f + (changed if gate is None else changed * gate.to(f.dtype).unsqueeze(-1))
    return made.flatten(2)
