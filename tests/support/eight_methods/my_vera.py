"""VeRA: vectors between shared random matrices.   y = x W + b0 + ((x A) * d) B * b    b starts at 0

Kopiczko et al. 2023, arXiv:2310.11454, eq. 2. Shapes A (d_in, r), B (r, d_out), uniform (Kaiming),
frozen, one pair for all ports of a shape; d (r,), 0.1, b (d_out,), 0; cost r + d_out.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import surgery


class Pair(nn.Module):
    """``((x A) * d) B``, (..., d_in) -> (..., d_out)."""

    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("a", (torch.rand(d_in, rank) * 2 - 1) * (3 / d_in) ** 0.5)
        self.register_buffer("b", (torch.rand(rank, d_out) * 2 - 1) * (3 / rank) ** 0.5)

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        return (x @ self.a.to(x) * d.to(x)) @ self.b.to(x)


class Vectors(nn.Module):
    """``pair(x, d) * b``, (..., d_in) -> (..., d_out)."""

    def __init__(self, pair: nn.Module | surgery.Reference, rank: int, d_out: int) -> None:
        super().__init__()
        self.pair = pair
        self.d, self.b = nn.Parameter(torch.full((rank,), 0.1)), nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, self.d) * self.b

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.pair(torch.eye(len(weight)).to(weight), self.d) * self.b, bias


@dataclass(frozen=True)
class MyVera(surgery.Method):
    """Scale shared random updates of projections. Start: exact. Mergeable."""

    name = "my_vera"
    rank: int = 16
    ports: tuple[str, ...] = ("query", "value")

    def named_ports(self, site: surgery.Site) -> tuple[str, ...]:
        return self.ports

    def suits(self, site: surgery.Site) -> bool:
        return bool(self.present_ports(site))

    def splice(self, site: surgery.OpenSite) -> None:
        for port in site.select(self.present_ports(site)):
            d_in, d_out = port.in_width or 0, port.width
            pair = site.share(f"{d_in}_{d_out}", partial(Pair, d_in, d_out, self.rank))
            port.add(Vectors(pair, self.rank, d_out), name=self.name)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(MyVera)
