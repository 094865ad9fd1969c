"""Give an adapter its own copy of whole linear layers, such as the head of its task.

    y' = y + (x W' + b') - (x W + b)         W', b' start as the base's W, b

y is the port as earlier splices leave it, by itself x W + b: then y' = x W' + b'. With several
their changes add up.

What is trained this way belongs to the splice: it is saved, switched, routed and removed with the
rest of the adapter, and the base keeps its own. ``surgery.freeze_base(model, keep=)`` trains the
base's own layer instead, which all splices share.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import surgery


class OwnProjection(nn.Module):
    """Compute y + (x W' + b') - (x W + b), which replaces the output y of a projection.

    Args:
        base: the projection x W + b.

    Shape: y (..., out), x (..., in) -> (..., out)
    Parameters: weight (out, in), bias (out,) or None: copies of the base's
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, bias = base, base.bias()
        self.weight = nn.Parameter(base.matrix().T.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @property
    def needs_bias(self) -> bool:
        return self.bias is not None

    def no_weight_decay(self) -> set[str]:
        return set() if self.bias is None else {"bias"}

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias, moved as W' and b' are from W and b."""
        moved = weight + (self.weight.T.to(weight) - self.base.matrix().to(weight))
        if bias is None or self.bias is None:
            return moved, bias
        return moved, bias + (self.bias.to(bias) - self.base.bias().to(bias))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        bias = self.base.bias()
        before = F.linear(
            x, self.base.matrix().T.to(x.dtype), None if bias is None else bias.to(x.dtype)
        )
        return y + (F.linear(x, self.weight, self.bias) - before)


@dataclass(frozen=True)
class Full(surgery.Method):
    """Train a copy of linear layers, such as a task's head; the base keeps its own.

    Args:
        modules: a regular expression that is searched for in the paths of the linear layers outside
            attention and FFN; by default all of them.

    Start: exact. Mergeable. Cost: (d_in + 1) d_out per layer.

    Example:
        ``surgery.splice(model, [surgery.method("lora"), surgery.method("full",
        modules="classifier")], name="sst2")``
    """

    name = "full"
    kinds = ("linear",)
    needs = "a linear layer whose path has the pattern modules="

    modules: str = "."

    def __post_init__(self) -> None:
        quick = surgery.are_quick_patterns([self.modules])
        self.require(bool(self.modules) and quick, "modules", "a regular expression that ends soon")

    def suits(self, site: surgery.Site) -> bool:
        port = site.ports.get("output")
        plain = port is not None and bool(port.weight) and port.columns is None
        return site.kind == "linear" and plain and bool(re.search(self.modules, site.path))

    def splice(self, site: surgery.OpenSite) -> None:
        port = site.port("output")
        module = OwnProjection(port.frozen())
        port.replace(module, name=self.name, reads=("output", "output.source"))


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(Full)
