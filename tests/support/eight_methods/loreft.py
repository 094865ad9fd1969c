"""LoReFT: an edit of hidden states in a subspace.   h' = h + R^T (W h + b - R h)   at chosen tokens

Wu et al. 2024, arXiv:2404.03592, eq. 2. Shapes R, W (r, D), b (r,); the rows of R are orthonormal
(the Q of a QR of a trained matrix). W is trained as its difference to R, zero at first, as is b.
Chosen are the first p and the last p tokens of the prompt: of the first call, no decoding step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery


class Edit(nn.Module):
    """``h + (h (W - R)^T + b) R`` at the chosen tokens, (B, n, D) -> (B, n, D)."""

    def __init__(self, width: int, rank: int, tokens: int) -> None:
        super().__init__()
        self.tokens, self.raw = tokens, nn.Parameter(torch.randn(width, rank))
        self.moved = nn.Linear(width, rank)  # W - R and b
        nn.init.zeros_(self.moved.weight)
        nn.init.zeros_(self.moved.bias)

    def forward(self, h: Tensor, padding: Tensor, cached: Tensor) -> Tensor:
        place, length = padding.cumsum(-1), padding.sum(-1, keepdim=True)
        ends = (place <= self.tokens) | (place > length - self.tokens)
        chosen = (padding & ends & (cached == 0))[..., None]
        return torch.where(chosen, h + self.moved(h) @ torch.linalg.qr(self.raw).Q.T, h)


@dataclass(frozen=True)
class LoReft(surgery.Method):
    """Edit the prompt's ends behind each block. Start: exact."""

    name = "loreft"
    kinds = ("block",)
    rank: int = 4
    tokens: int = 2

    def splice(self, site: surgery.OpenSite) -> None:
        module = Edit(site.width, self.rank, self.tokens)
        site.port("output").replace(module, name=self.name, reads=("output", "padding", "cached"))


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(LoReft)
