"""Attention over (B, n, 16) whose subclasses give it odd habits, before and after a splice."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery


class Attention(nn.Module):
    """Attention over (B, n, 16) in 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(16, 48), nn.Linear(16, 16)

    def heads(self, x: Tensor) -> list[Tensor]:
        parts = self.inward(x).chunk(3, -1)
        return [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in parts]

    def merge(self, y: Tensor) -> Tensor:
        out: Tensor = self.outward(y.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.heads(x)))


def pair(kind: type[nn.Module], *example: Any) -> tuple[Any, Any]:
    """A model, and a copy of it with two methods spliced in that start as it is."""
    torch.manual_seed(1)
    base = kind().eval()
    model = copy.deepcopy(base)
    methods = [
        surgery.method("inducer", key_rank=2, value_rank=2),
        surgery.method("lora", rank=2, ports=("query", "value")),
    ]
    surgery.splice(model, methods, example_inputs=example or (tokens(),))
    return base, model


def tokens(n: int = 5) -> Tensor:
    return torch.randn(2, n, 16, generator=torch.Generator().manual_seed(n))


def with_two_methods(model: nn.Module, *example: Any) -> nn.Module:
    methods = [
        surgery.method("inducer", key_rank=2, value_rank=2),
        surgery.method("lora", rank=2, ports=("query", "value")),
    ]
    surgery.splice(model, methods, example_inputs=example)
    return model


def check(model: nn.Module, example: tuple[Any, ...], cases: list[Any]) -> None:
    """Every call gives the bits of the base; each is made twice, in turn."""
    expected = [model(*args, **kwargs) for args, kwargs in cases]
    with_two_methods(model, *example)
    for _ in range(2):
        for (args, kwargs), output in zip(cases, expected, strict=True):
            assert torch.equal(model(*args, **kwargs), output)


def drawn(n: int = 5, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, 16)
