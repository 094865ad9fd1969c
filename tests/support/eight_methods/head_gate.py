"""Head gates: each head is scaled by a learned number.   y = (g_h merged_h) W + b     g starts at 1

Michel et al. 2019, arXiv:1905.10650, eq. 2 (their mask of heads, here trained). Shape g (H,) at
the merged heads (B, n, H d), the input of the output projection; cost H per attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery


class Gate(nn.Module):
    """``g_h merged_h``, (..., H d) -> (..., H d)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(heads))

    def forward(self, merged: Tensor) -> Tensor:
        return (merged.unflatten(-1, (len(self.gate), -1)) * self.gate[:, None]).flatten(-2)

    def fold_input(self, weight: Tensor) -> Tensor:
        return self(weight.T).T


@dataclass(frozen=True)
class HeadGate(surgery.Method):
    """Gate each attention head. Start: exact. Mergeable."""

    name = "head_gate"
    needs = "an output projection that reads the heads side by side"

    def suits(self, site: surgery.Site) -> bool:
        output = site.ports.get("output") if site.kind == "attention" else None
        return output is not None and output.in_width == site.heads * site.value_width

    def splice(self, site: surgery.OpenSite) -> None:
        site.port("output").feed(Gate(site.heads), name=self.name)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(HeadGate)
