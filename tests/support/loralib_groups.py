"""LoRA of two of the three parts of a fused projection, each part with an A of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.models import build, inputs, logits

LAYERS = [f"transformer.h.{layer}.attn.c_attn" for layer in (0, 1)]


def grouped(layers: list[str], rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of the first and the third of three groups of 32 features, each with its own A."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2 * rank, 32), (64, rank)
    return {x: tuple(torch.randn(s, generator=generator) * 0.2 for s in shapes) for x in layers}  # type: ignore[misc]


def by_hand(pairs: dict[str, tuple[Tensor, Tensor]], scale: float) -> Any:
    """The base with the products added to its fused weights (in, out)."""
    model = build("gpt2")
    with torch.no_grad():
        for path, (a, b) in pairs.items():
            weight, rank = model.get_submodule(path).weight, b.shape[1]
            weight[:, :32] += scale * (b[:32] @ a[:rank]).T
            weight[:, 64:] += scale * (b[32:] @ a[rank:]).T
    return logits(model, inputs("gpt2"))
