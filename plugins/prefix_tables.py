"""Make the keys and values of a prefix from rows (Le et al. 2024, arXiv:2410.02200).

The ways, by the name of the option ``share``, are listed in prefix.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

import surgery

Share = Literal["none", "simple", "linear", "layer", "global"]


class Rows(nn.Module):
    """Rows p (P, D); with ``hidden`` (``layer``, ``global``) they become tanh(p Wa + ba) (P, m).

    Parameters: rows N(0, std); inward D m + m: weight N(0, std), bias 0
    """

    def __init__(self, length: int, width: int, hidden: int, std: float) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(length, width) * std)
        self.inward = _linear(width, hidden, std) if hidden else None

    def forward(self) -> Tensor:
        return self.rows if self.inward is None else torch.tanh(self.inward(self.rows))


class Reparametrised(nn.Module):
    """Compute the keys and values of one layer from rows.

    () -> keys (G, P, d), values (G, P, d_v). Arguments and cost: see ``PrefixTuning``."""

    def __init__(
        self, site: surgery.OpenSite, share: Share, length: int, hidden: int, std: float
    ) -> None:
        super().__init__()
        self.share, self.groups = share, site.kv_heads
        self.widths = [site.kv_heads * site.head_width, site.kv_heads * site.value_width]
        inner = hidden if share in ("layer", "global") else 0
        sizes, shared = (length, site.width, inner, std), share == "global"
        self.rows: Any = site.share("rows", lambda: Rows(*sizes)) if shared else Rows(*sizes)
        if share == "simple":
            self.norm = site.frozen_norm()
            self.projections = [site.port(name).frozen() for name in ("key", "value")]
        else:
            self.outward = _linear(inner or site.width, sum(self.widths), std)

    def forward(self) -> tuple[Tensor, Tensor]:
        kind = next(self.parameters()).device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):  # what is kept serves plain forwards, too
                return self.forward()
        rows = self.rows()  # (P, D), or (P, m) after the first half of an MLP
        if self.share == "simple":
            rows = self.norm(rows)
            made = [project(rows) for project in self.projections]
        else:
            both = self.outward(rows)
            both = torch.tanh(both) if self.share == "linear" else both
            made = list(both.split(self.widths, -1))
        keys, values = (x.unflatten(-1, (self.groups, -1)).transpose(0, 1) for x in made)
        return keys, values

    def sources(self) -> Iterable[Tensor]:
        """All tensors that keys and values depend on, also those registered elsewhere."""
        own = [*self.parameters(), *getattr(self.rows, "module", self.rows).parameters()]
        if self.share != "simple":
            return own
        tensors = (x for projection in self.projections for x in projection.tensors())
        return [*own, *getattr(self.norm, "module", self.norm).parameters(), *tensors]


def _linear(width: int, out: int, std: float) -> nn.Linear:
    linear = nn.Linear(width, out)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear
