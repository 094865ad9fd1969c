"""Scale the input, or both sides, of frozen projections (SSL and SSB).

    SSL   W' = diag(a) W                 y = (x * a) W + b
    SSB   W' = diag(a) W diag(c)         y = ((x * a) W) * c + b         a and c start at 1

Si et al. 2024, arXiv:2407.05417, section 3. W is (in, out), so a is as long as the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery

PORTS = {"attention": ("query", "key", "value", "output"), "ffn": ("up", "gate", "output")}


class InputScale(nn.Module):
    """Return ``x * a``; the splice puts this module before a projection.

    Shape: (..., width) -> (..., width)
    Parameters: a (width,), ones
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.a

    def fold_input(self, weight: Tensor) -> Tensor:
        """Return ``diag(a) W``, W (width, d_out)."""
        return weight * self.a.to(weight).unsqueeze(-1)


class OutputScale(nn.Module):
    """Return ``(y - b) * c + b``; the splice puts this module after a projection with bias b.

    Shape: y (..., width), b (width,) or None -> (..., width)
    Parameters: c (width,), ones
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, bias: Tensor | None) -> Tensor:
        product = y if bias is None else y - bias
        return y + product * (self.c - 1)  # exactly y at c = 1

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ``W diag(c)`` and the scaled bias.

        ``bias`` lacks b, which this module reads and does not scale: merging passes only the part
        that earlier modules have added to it.
        """
        c = self.c.to(weight)
        return weight * c, None if bias is None else bias * c


@dataclass(frozen=True)
class SSL(surgery.Method):
    """Scale the input of chosen projections.

    Args:
        ports: query, key, value, output (attention); up, gate, output (FFN). ``output`` beside
            other ports is the output of their kind of site; alone it is that of both kinds.
            A port that a site lacks is left out there, and named in the report.

    Start: exact. Mergeable. Cost: the input width of each projection.

    Raises:
        MethodError: a port is unknown, or none is named.
    """

    name = "ssl"
    kinds = ("attention", "ffn")

    ports: tuple[str, ...] = ("query", "key", "value", "output")

    def __post_init__(self) -> None:
        known = {port for ports in PORTS.values() for port in ports}
        valid = bool(self.ports) and set(self.ports) <= known
        self.require(valid, "ports", f"some of {', '.join(sorted(known))}")

    def named_ports(self, site: surgery.Site) -> tuple[str, ...]:
        own = set(PORTS.get(site.kind, ()))
        addressed = (own - {"output"}) & set(self.ports) or set(self.ports) == {"output"}
        return tuple(p for p in self.ports if p in own) if addressed else ()

    def suits(self, site: surgery.Site) -> bool:
        return bool(self.present_ports(site))

    def splice(self, site: surgery.OpenSite) -> None:
        for port in site.select(self.present_ports(site)):
            assert port.in_width is not None  # present_ports() names no other
            port.feed(InputScale(port.in_width), name=self.name)


@dataclass(frozen=True)
class SSB(SSL):
    """Scale the input of chosen projections, and their output without its bias.

    Args:
        ports: as for ``ssl``.

    Start: exact. Mergeable. Cost: input width + output width of each projection.
    """

    name = "ssb"

    def splice(self, site: surgery.OpenSite) -> None:
        super().splice(site)
        for port in site.select(self.present_ports(site)):
            reads = (port.name, f"{port.name}.bias")
            port.replace(OutputScale(port.width), name=f"{self.name}_out", reads=reads)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(SSL)
    register(SSB)
