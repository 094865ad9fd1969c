"""Update frozen projections by low-rank products (LoRA).

    y = x W + b + s (drop(x) A B + c)            s = alpha / r, or alpha / sqrt(r) with ``rslora``

Hu et al. 2021, arXiv:2106.09685, eq. 3; rank-stabilised scaling: Kalajdzievski 2023,
arXiv:2312.03732. The trainable bias c is an option of the inducer paper's code (Chen et al. 2022,
arXiv:2210.14469), which also multiplies it by s.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery

PROJECTIONS = {
    "attention": ("query", "key", "value", "output"),
    "ffn": ("up", "gate", "output"),
    "linear": ("output",),
}


class LowRank(nn.Module):
    """Compute s (drop(x) A B + c), which the splice adds to the projection's output.

    Args:
        d_in, d_out: widths of the projection that it updates.
        rank: inner width r.
        scale: s.
        dropout: probability, on the input of A.
        bias: whether to add c.

    Shape:
        x (B, n, d_in), onto (B, n, d_out) or None -> (B, n, d_out)
    Parameters:
        a (rank, d_in)   A transposed: Kaiming-uniform with a = sqrt(5), as in the authors' loralib
        b (rank, d_out)  B: zeros, so the spliced model starts equal to the base
        bias (d_out,)    c: zeros, if ``bias``
    Cost: rank * (d_in + d_out) [+ d_out] parameters.
    """

    def __init__(
        self, d_in: int, d_out: int, rank: int, scale: float, dropout: float, bias: bool
    ) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = surgery.Dropout(dropout)
        self.a = nn.Parameter(torch.empty(rank, d_in))
        self.b = nn.Parameter(torch.zeros(rank, d_out))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    @property
    def needs_bias(self) -> bool:
        """Whether merging needs a bias on the projection, to take up c."""
        return self.bias is not None

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ``(W + s A B, b + s c)``, W (d_in, d_out)."""
        if bias is not None and self.bias is not None:
            bias = bias + self.scale * self.bias.to(bias)
        return weight + self.scale * (self.a.to(weight).T @ self.b.to(weight)), bias

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return the update, or its sum with ``onto``, in which the scale costs no operation."""
        if self.training:
            x = self.dropout(x)
        hidden = F.linear(x, self.a)  # (B, n, r)
        if onto is not None and onto.dtype == hidden.dtype:
            out = hidden @ self.b
            out = out if self.bias is None else out + self.bias.to(out.dtype)
            return torch.add(onto, out, alpha=self.scale)
        out = (hidden * self.scale) @ self.b
        out = out if self.bias is None else out + self.scale * self.bias.to(out.dtype)
        return out if onto is None else onto + out.to(onto.dtype)


@dataclass(frozen=True)
class LoRA(surgery.Method):
    """Add a low-rank update to projections of attention or FFN.

    In a fused projection only the columns of the named ports are updated.

    Args:
        rank: inner width r, at least 1.
        alpha: numerator of the scale s.
        rslora: s = alpha / sqrt(r) instead of alpha / r.
        ranks: other ranks for some sites, as ``{"layers.0.": 16, "mlp": 4}``: regular expressions
            that are searched for in a site's path; the first that is found gives the rank.
        ports: the projections: query, key, value, output (attention); up, gate, output (FFN);
            output (linear). ``output`` beside other ports is the output of their kind of site;
            alone it is that of every kind. ``"all"`` is every projection that a site has. What a
            site lacks is left out there, and the report names it.
        dropout: probability, on the input of A.
        bias: whether to add a trainable bias, scaled as the product is.

    Start: exact. Mergeable. Cost: rank * (d_in + d_out) [+ d_out] per projection.

    Raises:
        MethodError: an option is out of range.
        PortError: a port is unknown.
    """

    name = "lora"

    rank: int = 8
    alpha: float = 16.0
    ports: tuple[str, ...] = ("query", "value")
    dropout: float = 0.0
    bias: bool = False
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ports = (self.ports,) if isinstance(self.ports, str) else tuple(self.ports)
        object.__setattr__(self, "ports", ports)
        self.require(isinstance(self.rank, int) and self.rank >= 1, "rank", "an integer >= 1")
        for pattern, rank in self.ranks.items():
            valid = isinstance(rank, int) and rank >= 1 and _is_regular_expression(pattern)
            self.require(valid, "ranks", "regular expressions of paths, with integers >= 1")
        self.require(self.alpha > 0, "alpha", "a number > 0")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        known = sorted({port for ports in PROJECTIONS.values() for port in ports})
        self.require(bool(self.ports), "ports", f"some of {known}")
        for port in self.ports if self.ports != ("all",) else ():
            if port not in known:
                raise surgery.PortError(
                    f"method 'lora': no projection port {port!r}. {surgery.suggest(port, known)}"
                    f"Ports with a projection: {', '.join(known)}."
                )

    def suits(self, site: surgery.Site) -> bool:
        return bool(self.present_ports(site))

    def named_ports(self, site: surgery.Site) -> tuple[str, ...]:
        own = PROJECTIONS.get(site.kind, ())
        if self.ports == ("all",):
            return tuple(p for p in own if p in site.ports)
        addressed = (set(own) - {"output"}) & set(self.ports) or set(self.ports) == {"output"}
        return tuple(p for p in self.ports if p in own) if addressed else ()

    def without_attention(self) -> LoRA:
        return dataclasses.replace(self, ports=("all",))

    def splice(self, site: surgery.OpenSite) -> None:
        for port in site.select(self.present_ports(site)):
            assert port.in_width is not None
            rank = next((r for p, r in self.ranks.items() if re.search(p, site.path)), self.rank)
            scale = self.alpha / (math.sqrt(rank) if self.rslora else rank)
            update = LowRank(port.in_width, port.width, rank, scale, self.dropout, self.bias)
            port.add(update, name=self.name)


def _is_regular_expression(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(LoRA)
