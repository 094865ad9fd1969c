"""An empty batch, or one without tokens, goes through every method as through the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from tests.support.methods import NEEDED

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("inducer", {"variant": "gating"}),
    ("inducer", {"variant": "adaptive", "key_rank": 0}),
    ("prefix", {"gate": True}),
    ("prefix", {"share": "global", "dropout": 0.5}),
    ("lora", {"dropout": 0.5, "bias": True}),
]
CASES = [*((name, NEEDED.get(name, {})) for name in surgery.methods()), *VARIANTS]


class Block(nn.Module):
    """Attention and an FFN; its views name every size, so a batch may be empty."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, n, D = x.shape
        split = (B, n, self.heads, D // self.heads)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.inward(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.outward(y.transpose(1, 2).reshape(B, n, D))
        return x + self.narrow(F.gelu(self.wide(x)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.blocks = nn.Embedding(20, 16), nn.Sequential(Block(), Block())
        self.head = nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(ids)))


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_gives_what_the_base_gives(
    name: str, options: dict[str, Any], training: bool
) -> None:
    model = Decoder()
    surgery.splice(
        model, surgery.method(name, **options), example_inputs=torch.arange(10).view(2, 5)
    )
    model.train(training)
    for shape in ((0, 5), (2, 0), (0, 0)):
        ids = torch.zeros(shape, dtype=torch.long)
        with surgery.disabled(model):
            base = model(ids)
        with torch.set_grad_enabled(training):
            out = model(ids)
        assert torch.equal(out, base)
        assert (out.shape, out.dtype) == ((*shape, 16), base.dtype)
        if training:
            out.sum().backward()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ["prefix", "ntk_attention", "inducer"])
def test_an_empty_batch_goes_through_an_encoder_of_torch(name: str, batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    surgery.splice(model, surgery.method(name), example_inputs=torch.randn(2, 5, 16))
    empty = torch.zeros((0, 5, 16) if batch_first else (5, 0, 16))
    assert model(empty).shape == empty.shape
