"""Attend to an infinitely long prefix, held in one matrix and one vector per head (NTK-Attention).

    f' = (f + e^{-lse} phi(Q) Z) / (1 + e^{-lse} phi(Q) |k|)          phi(x) = elu(x / d^(1/4)) + 1

Liang et al. 2024, arXiv:2406.14036. f is the unchanged attention output, lse the logsumexp of its
scores; Z is (d, d_v) and k (d,), one of each per query head.

In the authors' code k starts at 0, where PyTorch's derivative of |k| is 0, so k never trains. Here
the derivative of |k| at 0 is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery


class State(nn.Module):
    """Compute ``f' - f``, which the splice adds to the merged heads.

    Args:
        heads, head_width, value_width: H, d and the width of a value head.

    Shape:
        merged (B, n, H d_v), query (B, H, n, d) as scored, lse (B, H, n) -> (B, n, H d_v)
    Parameters:
        z (H, d, d_v)  k (H, d)  zeros, so the spliced model starts equal to the base
    Cost: H (d d_v + d) parameters.
    """

    def __init__(self, heads: int, head_width: int, value_width: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.zeros(heads, head_width, value_width))
        self.k = nn.Parameter(torch.zeros(heads, head_width))

    def forward(self, merged: Tensor, query: Tensor, lse: Tensor) -> Tensor:
        wide = query.to(lse.dtype)  # at least float32
        phi = F.elu(wide / query.shape[-1] ** 0.25) + 1  # (B, H, n, d)
        k = torch.where(self.k < 0, -self.k, self.k).to(lse.dtype)  # |k|, derivative 1 at 0
        f = merged.unflatten(-1, (self.z.shape[0], -1)).transpose(1, 2)  # (B, H, n, d_v)
        mass = phi @ k.unsqueeze(-1)  # (B, H, n, 1)
        new = phi @ self.z.to(lse.dtype) - mass * f.to(lse.dtype)
        # A query that sees no key has lse = -inf, or the lowest number where an additive mask hides
        # all keys. Such a query is padding and keeps its f.
        no_keys = lse < torch.finfo(lse.dtype).min / 2
        weight = torch.exp(-lse.masked_fill(no_keys, 0.0).clamp(min=-60.0)).unsqueeze(-1)
        delta = weight * new / (1 + weight * mass)
        delta = delta.masked_fill(no_keys.unsqueeze(-1), 0.0)
        return delta.to(merged.dtype).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class NTKAttention(surgery.Method):
    """Add the effect of an infinitely long prefix to attention; there are no options.

    For attention sites that have the port ``lse``. Start: exact. Not mergeable. A KV cache stays
    that of the base. Cost: H (d d_v + d) per attention.
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
