"""Prefix-tuning: trained keys and values that every query of a layer may attend to.

    f' = softmax([scale Q P_k^T ; S]) [P_v ; V]                        P_k, P_v (G, P, d) per layer
       = (1 - g) f + g softmax(scale Q P_k^T) P_v
    g  = sigmoid(lse_P - lse)           lse_P = logsumexp(scale Q P_k^T), lse that of the scores S

Li and Liang 2021, arXiv:2101.00190; the second line is exact (Chen et al. 2022, arXiv:2210.14469,
section 3), so no key is concatenated, no mask grows and no position shifts: prefix keys are always
visible, and they are not rotated where queries are. ``gate`` multiplies g by a trained scalar per
head that starts at 0 (as tanh of it, Zhang et al. 2023, arXiv:2303.16199).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery


class Prefix(nn.Module):
    """What the prefix changes in the merged heads: ``g (prefix's context - f)``, to be added.

    Args:
        heads, kv_heads, head_width, value_width: H, G, d and the width of a value head.
        length: P.
        scale: the factor of the model's own scores.
        gate: whether g is multiplied by tanh of a trained scalar per head.
        std: of the normal distribution that keys and values start from; 0 starts them at zero.

    Shape:
        merged (B, n, H d), query (B, H, n, d) as scored, lse (B, H, n) -> (B, n, H d)
    Parameters:
        keys (G, P, d)  values (G, P, d)  N(0, std);  gate (H,)  zeros, if ``gate``
    Cost: 2 P G d [+ H] parameters.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_width: int,
        value_width: int,
        length: int,
        scale: float,
        gate: bool,
        std: float,
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.keys = nn.Parameter(torch.randn(kv_heads, length, head_width) * std)
        self.values = nn.Parameter(torch.randn(kv_heads, length, value_width) * std)
        self.gate = nn.Parameter(torch.zeros(heads)) if gate else None

    def forward(self, merged: Tensor, query: Tensor, lse: Tensor) -> Tensor:
        groups = self.heads // self.keys.shape[0]
        grouped = query.unflatten(1, (-1, groups))  # (B, G, H/G, n, d)
        scores = grouped @ self.keys.mT.unsqueeze(1) * self.scale  # (B, G, H/G, n, P)
        scores = scores.flatten(1, 2).to(lse.dtype)  # (B, H, n, P)
        g = torch.sigmoid(scores.logsumexp(-1) - lse)  # (B, H, n)
        if self.gate is not None:
            g = g * torch.tanh(self.gate.to(g.dtype)).unsqueeze(-1)
        weights = scores.softmax(-1).to(query.dtype).unflatten(1, (-1, groups))
        context = (weights @ self.values.unsqueeze(1)).flatten(1, 2).transpose(1, 2)  # (B, n, H, d)
        f = merged.unflatten(-1, (self.heads, -1))
        return (g.transpose(1, 2).unsqueeze(-1).to(f.dtype) * (context - f)).flatten(2)


@dataclass(frozen=True)
class PrefixTuning(surgery.Method):
    """Prefix-tuning of attention, wherever its logsumexp can be had.

    Args:
        length: P, how many keys and values per layer.
        gate: start exactly at the base model, through a gate per head that starts at zero.
        std: of the normal distribution that keys and values start from; 0 starts them at zero,
            and the outputs of attention at (1 - g) f.

    Start: none; with ``gate`` gated. Not mergeable. A KV cache stays that of the base.
    """

    name = "prefix"

    length: int = 20
    gate: bool = False
    std: float = 0.02

    def __post_init__(self) -> None:
        self.require(isinstance(self.length, int) and self.length >= 1, "length", "an integer >= 1")
        self.require(isinstance(self.gate, bool), "gate", "True or False")
        self.require(self.std >= 0, "std", "a number >= 0")

    @property
    def start(self) -> surgery.Start:
        return "gated" if self.gate else "none"

    def suits(self, site: surgery.Site) -> bool:
        return "lse" in site.ports

    def splice(self, site: surgery.Site) -> None:
        prefix = Prefix(
            site.heads, site.kv_heads, site.head_width, site.value_width, self.length, site.scale,
            self.gate, self.std,
        )  # fmt: skip
        port = site.port("merged")
        port.add(prefix, name=self.name, reads=("merged", "query_heads", "lse"))


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(PrefixTuning)
