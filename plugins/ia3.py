"""Rescale keys, values and the FFN's activation by learned vectors ((IA)^3).

    k' = l_k * k     v' = l_v * v     FFN: y = (l_ff * a) W + b       elementwise, l starts at 1

Liu et al. 2022, arXiv:2205.05638, section 3.3. The activation a is the input of the FFN's last
projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery


class Scale(nn.Module):
    """Multiply the last axis by a learned vector.

    Shape: (..., width) -> (..., width)
    Parameters: scale (width,), ones
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    @staticmethod
    def forward_grouped(modules: Sequence[Scale], x: Tensor) -> Tensor:
        """Return the rows of each module, times its vector."""
        scales = torch.stack([m.scale for m in modules])
        rows = x.reshape(len(modules), -1, x.shape[-1])
        return (rows * scales.unsqueeze(1)).view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Fold into the projection before it: ``(x W + b) * l``, W (d_in, width)."""
        scale = self.scale.to(weight)
        return weight * scale, None if bias is None else bias * scale

    def fold_input(self, weight: Tensor) -> Tensor:
        """Fold into the projection after it: ``(x * l) W + b``, W (width, d_out)."""
        return weight * self.scale.to(weight).unsqueeze(-1)


@dataclass(frozen=True)
class IA3(surgery.Method):
    """Rescale keys, values and the input of the FFN's last projection.

    Args:
        ports: some of key, value (attention) and output (FFN, whose input is rescaled). Where
            ``Sites.matching`` has picked projections, it is those: the input of an output
            projection, the output of any other.

    Start: exact. Mergeable. Cost: 2 G d per attention, F per FFN.

    Raises:
        MethodError: a port is unknown, or none is named.
    """

    name = "ia3"
    kinds = ("attention", "ffn")

    ports: tuple[str, ...] = ("key", "value", "output")

    def __post_init__(self) -> None:
        valid = set(self.ports) <= {"key", "value", "output"}
        self.require(bool(self.ports) and valid, "ports", "some of key, value, output")

    def named_ports(self, site: surgery.Site) -> tuple[str, ...]:
        kinds = {"attention": ("key", "value"), "ffn": ("output",)}
        return tuple(port for port in self.ports if port in kinds.get(site.kind, ()))

    def suits(self, site: surgery.Site) -> bool:
        return bool(self.present_ports(site))

    def splice(self, site: surgery.OpenSite) -> None:
        for port in site.select(self.present_ports(site)):
            if port.name == "output":
                assert port.in_width is not None  # present_ports() names no other
                port.feed(Scale(port.in_width), name=self.name)
            else:
                port.insert(Scale(port.width), name=self.name)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(IA3)
