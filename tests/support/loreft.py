"""LoReFT: the hidden states behind a block move in a subspace, at some tokens of the prompt.

    h' = h + R^T (W h + b - R h)     R (r, D) has orthonormal rows; at the first p and last s tokens

Wu et al. 2024, arXiv:2404.03592, eq. 2. A block's step of decoding is left as it is. W starts at R,
b at 0. Cost: 2 r D + r for each block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery


class Subspace(nn.Module):
    """``h + R^T (W h + b - R h)`` at some tokens, (B, n, D) -> (B, n, D)."""

    def __init__(self, width: int, rank: int, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last
        rows = torch.linalg.qr(torch.randn(width, rank))[0].T
        self.rotate, self.shift = nn.Parameter(rows), nn.Parameter(torch.zeros(rank))
        self.weight = nn.Parameter(rows.clone())

    def forward(self, h: Tensor, positions: Tensor, padding: Tensor, cached: Tensor) -> Tensor:
        end = padding.sum(-1, keepdim=True) - self.last  # in a prefill every token is here
        chosen = padding & (cached == 0) & ((positions < self.first) | (positions >= end))
        moved = h + (h @ (self.weight - self.rotate).T + self.shift) @ self.rotate
        return torch.where(chosen[..., None], moved, h)


@dataclass(frozen=True)
class LoReFT(surgery.Method):
    """Move the hidden states of each block in a subspace. Start: exact."""

    name = "loreft"
    kinds = ("block",)

    rank: int = 4
    first: int = 3
    last: int = 0

    def splice(self, site: surgery.OpenSite) -> None:
        module = Subspace(site.width, self.rank, self.first, self.last)
        reads = ("output", "positions", "padding", "cached")
        site.port("output").replace(module, name=self.name, reads=reads)
