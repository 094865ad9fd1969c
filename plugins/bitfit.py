"""Train the biases of a model and nothing else (BitFit).

    y = x W + b + delta        for every projection of attention and FFN that has a bias
    y = LN(x) + delta          for every norm that has one

Ben Zaken et al. 2022, arXiv:2106.10199. The biases themselves stay frozen. Their changes are
inserted modules, which are saved, switched off and removed as those of any method; merging adds
them to the biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery


class Shift(nn.Module):
    """Return ``y + delta``.

    Shape: (..., width) -> (..., width)
    Parameters: delta (width,), zeros
    """

    needs_bias = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(width))

    def no_weight_decay(self) -> set[str]:
        """Name delta to trainers as a parameter without weight decay: it is a bias."""
        return {"delta"}

    def forward(self, y: Tensor) -> Tensor:
        return y + self.delta

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(W, b + delta)``."""
        return weight, bias + self.delta.to(bias)


@dataclass(frozen=True)
class BitFit(surgery.Method):
    """Train the biases of attention, FFN and norms.

    A model without biases is refused. The head of a task is trained as a whole, see
    ``surgery.freeze_base``.

    Start: exact. Mergeable. Cost: the width of every bias (GPT-2 small 102,144).
    """

    name = "bitfit"
    kinds = ("attention", "ffn", "norm")
    needs = "a projection or a norm that has a bias"

    def suits(self, site: surgery.Site) -> bool:
        return site.kind in self.kinds and any(port.bias for port in site.ports.values())

    def splice(self, site: surgery.OpenSite) -> None:
        for port in [port for port in site.ports.values() if port.bias]:
            port.insert(Shift(port.width), name=self.name)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(BitFit)
