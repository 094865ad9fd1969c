"""LoHa: a Hadamard product of two low-rank products.   y = x W + b + s x ((A B) * (C D))    D: 0

Hyeon-Woo et al. 2021, arXiv:2108.06098, eq. 1 (FedPara), for the update of a frozen weight. Shapes
A, C (d_in, r), B, D (r, d_out); A, B, C normal, D zero; cost 2 r (d_in + d_out), rank up to r^2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery


class Hadamard(nn.Module):
    """``s x ((A B) * (C D))``, (..., d_in) -> (..., d_out)."""

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.randn(d_in, rank) / d_in**0.5)
        self.b = nn.Parameter(torch.randn(rank, d_out) / rank**0.5)
        self.c = nn.Parameter(torch.randn(d_in, rank))
        self.d = nn.Parameter(torch.zeros(rank, d_out))

    def delta(self) -> Tensor:
        return self.scale * (self.a @ self.b) * (self.c @ self.d)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.delta()

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta().to(weight), bias


@dataclass(frozen=True)
class MyLoha(surgery.Method):
    """Update projections by Hadamard products. Start: exact. Mergeable."""

    name = "my_loha"
    rank: int = 4
    alpha: float = 4.0
    ports: tuple[str, ...] = ("query", "value")

    def named_ports(self, site: surgery.Site) -> tuple[str, ...]:
        return self.ports

    def suits(self, site: surgery.Site) -> bool:
        return bool(self.present_ports(site))

    def splice(self, site: surgery.OpenSite) -> None:
        for port in site.select(self.present_ports(site)):
            scale = self.alpha / self.rank
            port.add(Hadamard(port.in_width or 0, port.width, self.rank, scale), name=self.name)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(MyLoha)
