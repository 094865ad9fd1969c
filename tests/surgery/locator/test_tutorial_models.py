"""Attention as tutorials write it: a module for each head, concatenated in front of one layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from tests.support.models import perturb

WIDTH, HEADS, LENGTH = 12, 3, 8


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, WIDTH // HEADS) for _ in range(3))
        self.register_buffer("tril", torch.ones(LENGTH, LENGTH).tril())

    def forward(self, x: Tensor) -> Tensor:
        n, k, q = x.shape[1], self.key(x), self.query(x)
        scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        scores = scores.masked_fill(self.tril[:n, :n] == 0, float("-inf"))
        return F.softmax(scores, dim=-1) @ self.value(x)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head() for _ in range(HEADS)])
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


def by_hand(model: Heads, x: Tensor, prefixes: list[nn.Module]) -> Tensor:
    """Each head attends to its own prefix in front of the sequence."""
    n, outs = x.shape[1], []
    seen = torch.ones(n, n).tril().bool()
    for head, prefix in zip(model.heads, prefixes, strict=True):
        keys = torch.cat([prefix.keys.expand(len(x), -1, -1), head.key(x)], 1)
        values = torch.cat([prefix.values.expand(len(x), -1, -1), head.value(x)], 1)
        mask = torch.cat([torch.ones(n, prefix.keys.shape[1]).bool(), seen], 1)
        outs.append(F.scaled_dot_product_attention(head.query(x), keys, values, mask))
    return model.proj(torch.cat(outs, -1))


def test_each_head_is_a_site_and_takes_virtual_tokens() -> None:
    torch.manual_seed(0)
    model, x = Heads().double().eval(), torch.randn(2, 6, WIDTH).double()
    sites = surgery.locate(model, x).attention.expect(HEADS)
    assert [site.key for site in sites] == ["heads.0", "heads.1", "heads.2"]
    assert all(site.ports["output"].weight == "proj.weight" for site in sites)
    base = model(x)
    surgery.splice(model, surgery.method("inducer", key_rank=2, value_rank=2), at=sites)
    assert torch.equal(model(x), base)
    surgery.remove(model)
    report = surgery.splice(model, surgery.method("prefix", length=2), at=sites)
    perturb(model, 1.0)
    prefixes = [model.get_submodule(i.path) for i in report.inserted]
    torch.testing.assert_close(model(x), by_hand(model, x, prefixes), rtol=0, atol=1e-12)
    other = torch.randn(1, 3, WIDTH).double()
    torch.testing.assert_close(model(other), by_hand(model, other, prefixes), rtol=0, atol=1e-12)
