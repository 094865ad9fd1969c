"""NTK-Attention: an infinitely long prefix, held in one matrix and one vector per head.

    f' = (f + e^{-lse} phi(Q) Z) / (1 + e^{-lse} phi(Q) |k|)          phi(x) = elu(x / d^(1/4)) + 1

Liang et al. 2024, arXiv:2406.14036. f is the unchanged attention output, lse the logsumexp of its
scores; Z (d, d_v) and k (d,) per query head. The release's |k| has no gradient at its own start,
k = 0, and never trains; here the derivative of |k| at 0 is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery


class State(nn.Module):
    """``f' - f``, to be added to the merged heads.

    Args:
        heads, head_width, value_width: H, d and the width of a value head.

    Shape:
        merged (B, n, H d), query (B, H, n, d) as scored, lse (B, H, n) -> (B, n, H d)
    Parameters:
        z (H, d, d_v)  k (H, d)  zeros: the spliced model starts equal
    Cost: H (d d_v + d) parameters.
    """

    def __init__(self, heads: int, head_width: int, value_width: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.zeros(heads, head_width, value_width))
        self.k = nn.Parameter(torch.zeros(heads, head_width))

    def forward(self, merged: Tensor, query: Tensor, lse: Tensor) -> Tensor:
        wide = query.to(lse.dtype)
        phi = F.elu(wide / query.shape[-1] ** 0.25) + 1  # (B, H, n, d)
        k = torch.where(self.k < 0, -self.k, self.k).to(lse.dtype)
        f = merged.unflatten(-1, (self.z.shape[0], -1)).transpose(1, 2)  # (B, H, n, d_v)
        mass = phi @ k.unsqueeze(-1)  # (B, H, n, 1)
        new = phi @ self.z.to(lse.dtype) - mass * f.to(lse.dtype)
        # A query that may see no key has lse = -inf, or the lowest number: padding, left alone.
        nothing = lse < torch.finfo(lse.dtype).min / 2
        weight = torch.exp(-lse.masked_fill(nothing, 0.0).clamp(min=-60.0)).unsqueeze(-1)
        delta = weight * new / (1 + weight * mass)
        delta = delta.masked_fill(nothing.unsqueeze(-1), 0.0)
        return delta.to(merged.dtype).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class NTKAttention(surgery.Method):
    """NTK-Attention, wherever the attention's logsumexp can be had. It has no options.

    Start: exact. Not mergeable. A KV cache stays that of the base.
    """

    name = "ntk_attention"

    def suits(self, site: surgery.Site) -> bool:
        return "lse" in site.ports

    def splice(self, site: surgery.OpenSite) -> None:
        state = State(site.heads, site.head_width, site.value_width)
        reads = ("merged", "query_heads", "lse")
        site.port("merged").add(state, name=self.name, reads=reads)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(NTKAttention)
