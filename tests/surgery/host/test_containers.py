"""A stack of blocks does not call what is spliced around it as one more block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support.forwards import Attention


class Block(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.merge(attended)


class Loop(nn.Module):
    """A stack that loops over its children."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        for i, block in enumerate(blocks):
            self.add_module(str(i), block)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x


class Decoder(nn.Module):
    def __init__(self, stack: type[nn.Module]) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(40, 16), nn.Embedding(32, 16)
        self.blocks, self.head = stack(Block(), Block()), nn.Linear(16, 40)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        out: Tensor = self.head(self.blocks(x))
        return out


@pytest.mark.parametrize("stack", [nn.Sequential, Loop])
def test_a_stack_runs_its_blocks_alone(stack: Any) -> None:
    torch.manual_seed(0)
    model, ids = Decoder(stack).eval(), torch.arange(12).reshape(2, 6)
    base = copy.deepcopy(model)
    surgery.splice(model, surgery.method("prompt", length=3), example_inputs=ids)
    out = model(ids)
    assert out.shape == base(ids).shape
    assert not torch.equal(out, base(ids))
    with surgery.disabled(model):
        assert torch.equal(model(ids), base(ids))
    assert len(list(model.blocks.children())) > 2  # who trains and moves a model sees everything
    if stack is nn.Sequential:
        assert len(model.blocks) == 2
        assert next(iter(model.blocks)) is model.blocks[0]
    surgery.remove(model)
    assert torch.equal(model(ids), base(ids))
