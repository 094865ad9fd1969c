"""Update frozen projections in direction by a low-rank product, and in magnitude by itself (DoRA).

    W' = (W + s A B) diag(c)          y = x W' + b
    c  = m / ||W + s A B||            the norm of each column of (in, out), m starts at that of W

Liu et al. 2024, arXiv:2402.09353, eq. 5. As in section 4.3 there, no gradient runs through the
norm. The module is given y = x W + b and adds what is missing, so m = ||W|| and B = 0 change no
bit. Dropout is on the input of A alone; PEFT in training also drops what c rescales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery_plugins.lora_options import PROJECTIONS, LowRankMethod


class Decomposed(nn.Module):
    """Compute ``y + (c - 1)(y - b) + c s drop(x) A B``.

    Args:
        base: the projection that it updates, whose weight is read at each call.
        d_in, d_out: its widths.
        rank: inner width r.
        scale: s.
        dropout: probability, on the input of A.

    Shape:
        y (B, n, d_out), x (B, n, d_in), b (d_out,) or None -> (B, n, d_out)
    Parameters:
        a (rank, d_in)      A transposed: Kaiming-uniform with a = sqrt(5)
        b (rank, d_out)     B: zeros
        magnitude (d_out,)  m: the norms of W's columns
    Cost: rank * (d_in + d_out) + d_out parameters.
    """

    def __init__(
        self, base: Any, d_in: int, d_out: int, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.dropout = surgery.Dropout(dropout)
        self.a = nn.Parameter(torch.empty(rank, d_in))
        self.b = nn.Parameter(torch.zeros(rank, d_out))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        weight = base.matrix()
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.magnitude = nn.Parameter(_norm(weight.to(wide)))

    def no_weight_decay(self) -> set[str]:
        """Name m to trainers as a parameter without weight decay, which would shrink the base."""
        return {"magnitude"}

    def fast_parameters(self) -> set[str]:
        """Name B to LoRA+."""
        return {"b"}

    def ratio(self, dtype: torch.dtype) -> Tensor:
        """Return c (d_out,) for the base's weight as it is now."""
        a, b = self.a.detach().to(dtype), self.b.detach().to(dtype)
        norm = _norm(self.base.matrix().to(dtype) + self.scale * (a.T @ b))
        return self.magnitude.to(dtype) / norm.clamp_min(torch.finfo(dtype).tiny)

    def forward(self, y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        c = self.ratio(self.a.dtype)
        product = y if bias is None else y - bias
        hidden = F.linear(self.dropout(x), self.a) * self.scale
        return (y + product * (c - 1) + (hidden @ self.b) * c).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ``(W + s A B) diag(c)`` and the scaled bias.

        ``weight`` may hold earlier updates; c is that of the base, as in forward. ``bias`` lacks b,
        which this module reads and does not scale.
        """
        c = self.ratio(weight.dtype)
        update = self.scale * (self.a.to(weight).T @ self.b.to(weight))
        return (weight + update) * c, None if bias is None else bias * c


def _norm(weight: Tensor) -> Tensor:
    """Return the norm of each column of W (in, out)."""
    return torch.linalg.vector_norm(weight, dim=0)


@dataclass(frozen=True)
class DoRA(LowRankMethod):
    """Add a low-rank update to projections, and train the norm of each of their output features.

    At attention, FFN and linear sites, where a plain matrix makes the port.

    Args:
        rank, alpha, ports, dropout, rslora, ranks, alphas, fused: as for ``lora``.

    Start: exact. Mergeable. Cost: rank * (d_in + d_out) + d_out per projection. Each forward makes
    a matrix of the size of W, for its norms.

    Raises:
        MethodError: an option is out of range.
        PortError: a port is unknown, or made by no plain matrix.
    """

    name = "dora"
    projections: ClassVar = {kind: PROJECTIONS[kind] for kind in ("attention", "ffn", "linear")}

    def suits(self, site: surgery.Site) -> bool:
        return site.kind in self.projections and super().suits(site)

    def splice(self, site: surgery.OpenSite) -> None:
        whole: dict[str, Decomposed] = {}  # the first update of each fused projection
        for port in site.select(self.present_ports(site)):
            rank, scale = self.rank_and_scale(site, port)
            assert port.in_width is not None
            widths = port.in_width, port.width
            update = Decomposed(port.frozen(), *widths, rank, scale, self.dropout)
            if self.fused and port.module:
                update.a = whole.setdefault(port.module, update).a
            reads = (port.name, f"{port.name}.source", f"{port.name}.bias")
            port.replace(update, name=self.name, reads=reads)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(DoRA)
