"""DoRA: magnitude and direction of a weight.   y = x W' + b,   W' = m (W + s A B) / |W + s A B|_col

Liu et al. 2024, arXiv:2402.09353, eq. 5; the norm gets no gradient (their section 4.3). Shapes
A (d_in, r) normal, B (r, d_out) zero, m (d_out,) |W|_col; cost r (d_in + d_out) + d_out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery


class Directed(nn.Module):
    """``y + (g - 1) (y - b) + g s x A B`` with g = m / |W + s A B|_col, (..., d_out)."""

    def __init__(self, port: surgery.OpenPort, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = port.frozen(), scale
        self.a = nn.Parameter(torch.randn(port.in_width or 0, rank) / (port.in_width or 1) ** 0.5)
        self.b = nn.Parameter(torch.zeros(rank, port.width))
        self.magnitude = nn.Parameter(self.directed(self.base.matrix().to(self.a)).norm(dim=0))

    def directed(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.a.to(weight) @ self.b.to(weight))

    def forward(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        gain = self.magnitude / self.directed(self.base.matrix().to(self.a)).norm(dim=0).detach()
        plain = y if bias is None else y - bias
        return y + (gain - 1) * plain + gain * self.scale * (x @ self.a @ self.b)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        direction = self.directed(weight)
        return direction * (self.magnitude.to(weight) / direction.norm(dim=0)), bias


@dataclass(frozen=True)
class MyDora(surgery.Method):
    """Update direction and magnitude of projections. Start: exact. Mergeable."""

    name = "my_dora"
    kinds = ("attention", "ffn")
    rank: int = 8
    alpha: float = 16.0
    ports: tuple[str, ...] = ("query", "value")

    def named_ports(self, site: surgery.Site) -> tuple[str, ...]:
        return self.ports

    def suits(self, site: surgery.Site) -> bool:
        return bool(self.present_ports(site))

    def splice(self, site: surgery.OpenSite) -> None:
        for port in site.select(self.present_ports(site)):
            reads = (port.name, f"{port.name}.source", f"{port.name}.bias")
            module = Directed(port, self.rank, self.alpha / self.rank)
            port.replace(module, name=self.name, reads=reads)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(MyDora)
