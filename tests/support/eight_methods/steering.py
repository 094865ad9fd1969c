"""Steering vectors: h' = h + s v behind a block,   v = mean of h+ - mean of h-

Rimsky et al. 2023, arXiv:2312.06681, eq. 1. Shape v (D,), a buffer: nothing is trained. Batches
0, 2, ... are the positive examples, 1, 3, ... the negative; means are over real tokens. v is 0
until ``surgery.fit``. A constant folds, where the block adds a bias last.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import surgery


class Steer(nn.Module):
    """``h + s v``, (B, n, D) -> (B, n, D)."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale, self.needs_bias = scale, True
        self.register_buffer("vector", torch.zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        return h + (self.scale * self.vector).to(h)

    def fold(self, weight: None, bias: Tensor) -> tuple[None, Tensor]:
        return weight, bias + self.scale * self.vector.to(bias)


@dataclass(frozen=True)
class Steering(surgery.Method):
    """Add a vector behind each block that ``fit`` takes from data. Start: none."""

    name, kinds, learns, start = "steering", ("block",), False, "none"
    scale: float = 1.0

    def splice(self, site: surgery.OpenSite) -> None:
        site.port("output").insert(Steer(site.width, self.scale), name=self.name)

    def fit(self, model: nn.Module, batches: Any) -> None:
        states: dict[nn.Module, Tensor] = {}
        hooks = []
        for module in self.inserted:
            module.vector.zero_()
            hooks.append(module.register_forward_hook(lambda m, h, _: states.update({m: h[0]})))
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for number, batch in enumerate(batches):
            model(**batch)
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            sides[number % 2].append(torch.stack([states[m][real] for m in self.inserted]))
        positive, negative = (torch.cat(side, 1).mean(1) for side in sides)
        for module, hook, vector in zip(self.inserted, hooks, positive - negative, strict=True):
            hook.remove()
            module.vector.copy_(vector)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(Steering)
