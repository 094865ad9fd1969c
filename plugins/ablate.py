"""Ablate attention heads: the output projection reads zeros in their place.

    merged' = merged * kept      kept (H,), 0 for an ablated head, 1 for the others

Michel et al. 2019, arXiv:1905.10650, section 2.2: a mask variable for each head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery


class KeepHeads(nn.Module):
    """Multiply each head by 0 or 1.

    Shape: (B, n, H d) -> (B, n, H d)
    Buffers: kept (H,)
    """

    kept: Tensor

    def __init__(self, heads: int, ablated: tuple[int, ...]) -> None:
        super().__init__()
        kept = torch.ones(heads)
        kept[list(ablated)] = 0
        self.register_buffer("kept", kept)

    def forward(self, merged: Tensor) -> Tensor:
        heads = merged.unflatten(-1, (len(self.kept), -1))  # (B, n, H, d)
        off = (self.kept == 0)[:, None]
        return heads.masked_fill(off, 0).flatten(-2)  # a head of infinities gives 0, too


@dataclass(frozen=True)
class Ablate(surgery.Method):
    """Let heads give nothing.

    Args:
        heads: the numbers of the heads, from 0; the same at each site.

    Start: none. Cost: H numbers per attention, none of them trained.

    Raises:
        MethodError: a number is negative or named twice, or a site has no such head.
    """

    name = "ablate"
    learns = False
    needs = "heads side by side, the port 'merged'"

    heads: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        distinct = len(set(self.heads)) == len(self.heads) > 0
        valid = distinct and all(head >= 0 for head in self.heads)
        self.require(valid, "heads", "a list of different head numbers, from 0")

    @property
    def start(self) -> surgery.Start:
        return "none"

    def suits(self, site: surgery.Site) -> bool:
        return site.kind == "attention" and "merged" in site.ports

    def check(self, sites: list[surgery.Site]) -> None:
        for site in sites:
            missing = [head for head in self.heads if head >= site.heads]
            if missing:
                raise surgery.MethodError(
                    f"method 'ablate': {site.path or 'the model'} has no head {missing[0]}. Its "
                    f"{site.heads} heads are numbered from 0; choose among them, or other sites."
                )

    def splice(self, site: surgery.OpenSite) -> None:
        module = KeepHeads(site.heads, self.heads)
        site.port("merged").replace(module, name=self.name, reads=("merged",))


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(Ablate)
