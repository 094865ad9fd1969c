"""SSL and SSB: scaling of the subspaces of a frozen weight.

    SSL   W' = diag(a) W                 y = (x * a) W + b
    SSB   W' = diag(a) W diag(c)         y = ((x * a) W) * c + b         a and c start at 1

Si et al. 2024, arXiv:2407.05417, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery

PORTS = {"attention": ("query", "key", "value", "output"), "ffn": ("up", "gate", "output")}


class InputScale(nn.Module):
    """``x * a``, in front of a projection.

    Shape: (..., width) -> (..., width)
    Parameters: a (width,), ones
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.a

    def fold_input(self, weight: Tensor) -> Tensor:
        return weight * self.a.to(weight).unsqueeze(-1)


class OutputScale(nn.Module):
    """``(y - b) * c + b``, behind a projection with bias b.

    Shape: y (..., width), b (width,) or None -> (..., width)
    Parameters: c (width,), ones
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, bias: Tensor | None) -> Tensor:
        product = y if bias is None else y - bias
        return y + product * (self.c - 1)  # at c = 1 every bit of y

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        c = self.c.to(weight)
        return weight * c, None if bias is None else bias * c  # what there is besides b


@dataclass(frozen=True)
class SSL(surgery.Method):
    """Scale what chosen projections read.

    Args:
        ports: query, key, value, output (attention); up, gate, output (FFN). ``output`` alone
            means that of the FFN too; name a port of the attention, and attention is meant.

    Start: exact. Mergeable. Cost: the width of what each projection reads.
    """

    name = "ssl"
    kinds = ("attention", "ffn")

    ports: tuple[str, ...] = ("query", "key", "value", "output")

    def __post_init__(self) -> None:
        object.__setattr__(self, "ports", tuple(self.ports))
        known = {port for ports in PORTS.values() for port in ports}
        fits = bool(self.ports) and set(self.ports) <= known
        self.require(fits, "ports", f"some of {', '.join(sorted(known))}")

    def suits(self, site: surgery.Site) -> bool:
        own = set(PORTS.get(site.kind, ()))
        if not (own - {"output"}) & set(self.ports) and set(self.ports) != {"output"}:
            return False
        made = [site.ports.get(name) for name in self.ports if name in own]
        return bool(made) and all(port is not None and port.in_width for port in made)

    def splice(self, site: surgery.OpenSite) -> None:
        for port in site.select(tuple(p for p in self.ports if p in PORTS[site.kind])):
            assert port.in_width is not None  # see suits
            port.feed(InputScale(port.in_width), name=self.name)


@dataclass(frozen=True)
class SSB(SSL):
    """Scale what chosen projections read, and what they give but for its bias.

    Args:
        ports: as for ``ssl``.

    Start: exact. Mergeable. Cost: both widths of each projection.
    """

    name = "ssb"

    def splice(self, site: surgery.OpenSite) -> None:
        super().splice(site)
        for port in site.select(tuple(p for p in self.ports if p in PORTS[site.kind])):
            reads = (port.name, f"{port.name}.bias")
            port.replace(OutputScale(port.width), name=f"{self.name}_out", reads=reads)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(SSL)
    register(SSB)
