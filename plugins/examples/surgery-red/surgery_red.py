"""RED: the output of each FFN is scaled and shifted.   h' = l * h + b      l starts at 1, b at 0

Wu et al. 2024, arXiv:2402.15179, eq. 3. Shapes l, b (D,); cost 2 D per FFN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery


class Edit(nn.Module):
    """``l * h + b``, (..., width) -> (..., width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * h + self.bias


@dataclass(frozen=True)
class RED(surgery.Method):
    """Scale and shift the output of each FFN. Start: exact."""

    name = "red"
    kinds = ("ffn",)

    def splice(self, site: surgery.OpenSite) -> None:
        site.port("output").insert(Edit(site.width), name=self.name)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(RED)
