"""(IA)^3: learned rescaling of keys, values and what the FFN's last projection reads.

    k' = l_k * k     v' = l_v * v     FFN: y = (l_ff * a) W + b       elementwise, l starts at 1

Liu et al. 2022, arXiv:2205.05638, section 3.3.
"""

from __future__ import annotations

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

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Behind a projection, (x W + b) l."""
        scale = self.scale.to(weight)
        return weight * scale, None if bias is None else bias * scale

    def fold_input(self, weight: Tensor) -> Tensor:
        """In front of it, (x l) W + b."""
        return weight * self.scale.to(weight).unsqueeze(-1)


@dataclass(frozen=True)
class IA3(surgery.Method):
    """Rescale keys, values and the input of the FFN's last projection.

    Args:
        ports: which of key, value (attention) and output (FFN).

    Start: exact. Mergeable. Cost: 2 G d per attention, F per FFN.
    """

    name = "ia3"
    kinds = ("attention", "ffn")

    ports: tuple[str, ...] = ("key", "value", "output")

    def __post_init__(self) -> None:
        object.__setattr__(self, "ports", tuple(self.ports))
        known = set(self.ports) <= {"key", "value", "output"}
        self.require(bool(self.ports) and known, "ports", "some of key, value, output")

    def _own(self, site: surgery.Site) -> list[str]:
        kinds = {"attention": ("key", "value"), "ffn": ("output",)}
        return [port for port in self.ports if port in kinds.get(site.kind, ())]

    def suits(self, site: surgery.Site) -> bool:
        made = [site.ports.get(name) for name in self._own(site)]
        return bool(made) and all(port is not None and port.in_width for port in made)

    def splice(self, site: surgery.OpenSite) -> None:
        for port in site.select(tuple(self._own(site))):
            if site.kind == "ffn":
                assert port.in_width is not None  # see suits
                port.feed(Scale(port.in_width), name=self.name)
            else:
                port.insert(Scale(port.width), name=self.name)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(IA3)
