"""Talking heads: scores and weights are mixed across heads.   w = P_w softmax(P_l scores)

Shazeer et al. 2020, arXiv:2003.02436, section 3. Shapes scores, weights (B, H, n, m), P_l and
P_w (H, H), the identity at first; cost 2 H^2 per attention. What is masked stays masked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery


class Mix(nn.Module):
    """``sum_h P[h, i] s_h``, (B, H, n, m) -> (B, H, n, m); entries masked by a low number stay."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(heads))

    def forward(self, scores: Tensor) -> Tensor:
        masked = scores < torch.finfo(torch.float16).min / 4
        mixed = torch.einsum("bhnm,hi->binm", scores.masked_fill(masked, 0), self.mix)
        return torch.where(masked, scores, mixed)


@dataclass(frozen=True)
class TalkingHeads(surgery.Method):
    """Mix heads before the softmax and after it. Start: exact."""

    name = "talking_heads"
    needs = 'the ports scores and weights (attn_implementation="eager")'

    def suits(self, site: surgery.Site) -> bool:
        return {"scores", "weights"} <= set(site.ports)

    def splice(self, site: surgery.OpenSite) -> None:
        for port in site.select(("scores", "weights")):  # in this order: weights read new scores
            port.insert(Mix(site.heads), name=self.name)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(TalkingHeads)
