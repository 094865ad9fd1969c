"""Attention as people write it: in the manner of timm, by einsum, by baddbmm, recurrently."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from tests.support.models import perturb

D, H = 16, 2


class Timm(nn.Module):
    """qkv in one projection, norms of queries and keys, fused or not by a flag of its own."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused_attn, self.scale = fused, (D // H) ** -0.5
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.q_norm, self.k_norm = nn.LayerNorm(D // H), nn.LayerNorm(D // H)
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            y = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(B, N, C)))


class Einsum(nn.Module):
    """Weights with axes for heads, and every product an einsum."""

    def __init__(self) -> None:
        super().__init__()
        shape = (D, H, D // H)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(shape) / 4) for _ in range(3))
        self.o = nn.Parameter(torch.randn(H, D // H, D) / 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnd,dhe->bnhe", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bnhe,bmhe->bhnm", q, k) / math.sqrt(D // H)
        mixed = torch.einsum("bhnm,bmhe->bnhe", scores.softmax(-1), v)
        return torch.einsum("bnhe,hed->bnd", mixed, self.o)


class Batched(nn.Module):
    """Heads on the batch axis, a bias added by baddbmm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, n, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(B, n, H, -1).transpose(1, 2).reshape(B * H, n, -1)

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        bias = torch.linspace(-1, 0, n).expand(B * H, 1, n)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=(D // H) ** -0.5)
        mixed = torch.bmm(torch.softmax(scores, -1), v)
        return self.o(mixed.view(B, H, n, -1).transpose(1, 2).reshape(B, n, D))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """One block that is called again and again on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(D), Timm(fused=True)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.mix(self.norm(x))
        return x


class ByFeature(nn.Module):
    """Keys are made as the product needs them, heads on an axis of their own or on the batch's."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        B, n, _ = x.shape
        q, k, v = (f(x).view(B, n, H, -1) for f in (self.q, self.k, self.v))
        q, k, v = q.transpose(1, 2), k.permute(0, 2, 3, 1), v.transpose(1, 2)
        if self.flat:
            q, k, v = (y.reshape(B * H, *y.shape[2:]) for y in (q, k, v))
        weights = torch.softmax(q @ k * (D // H) ** -0.5, -1)
        mixed = (weights @ v).view(B, H, n, -1)
        return self.o(mixed.transpose(1, 2).reshape(B, n, D))  # type: ignore[no-any-return]


STYLES = {
    "timm, fused": lambda: Timm(True),
    "timm": lambda: Timm(False),
    "einsum": Einsum,
    "baddbmm": Batched,
    "recurrent": Recurrent,
    "keys by feature": lambda: ByFeature(False),
    "keys by feature, flat": lambda: ByFeature(True),
}


class Look(nn.Module):
    """Keeps what it reads."""

    def forward(self, *read: Tensor) -> Tensor:
        self.read = read
        return read[0]


@dataclass(frozen=True)
class Looking(surgery.Method):
    name = "looking"

    def splice(self, site: surgery.Site) -> None:
        reads = ("merged", "query_heads", "key_heads", "value_heads")
        site.port("merged").replace(Look(), name=self.name, reads=reads)


@pytest.mark.parametrize("n", [5, D // H])  # where tokens and features could be mistaken, too
@pytest.mark.parametrize("style", STYLES)
def test_heads_are_read_with_tokens_before_features(style: str, n: int) -> None:
    torch.manual_seed(0)
    model, x = STYLES[style]().eval(), torch.randn(3, n, D)
    site = surgery.locate(model, x).expect(1)[0]
    assert site.kv_heads == H
    surgery.splice(model, Looking(), at=site)
    model(x)
    merged, q, k, v = next(m for m in model.modules() if isinstance(m, Look)).read
    assert k.shape == v.shape == (3, H, n, D // H)
    bias = torch.linspace(-1, 0, n) if style == "baddbmm" else 0.0
    context = torch.softmax(q @ k.mT * site.scale + bias, -1) @ v
    torch.testing.assert_close(context.transpose(1, 2).flatten(2), merged, rtol=0, atol=1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_it_is_found_starts_exact_is_alive_and_comes_out_again(style: str) -> None:
    torch.manual_seed(0)
    model, x = STYLES[style]().eval(), torch.randn(3, 5, D)
    base = model(x)
    site = surgery.locate(model, x).expect(1)[0]
    assert (site.kind, site.heads, site.head_width) == ("attention", H, D // H)
    methods = [
        surgery.method("lora", rank=2, ports=("query", "key", "value", "output")),
        surgery.method("inducer", key_rank=2, value_rank=2),
        surgery.method("prefix", length=2, gate=True),
    ]
    surgery.splice(model, methods, at=site)
    assert torch.equal(model(x), base)
    perturb(model, 0.3)
    moved = model(x)
    assert not torch.allclose(moved, base, atol=1e-3)
    assert torch.allclose(model(x[1:2]), moved[1:2], atol=1e-5)  # rows go to their own tokens
    assert torch.allclose(model(x.flip(0)), moved.flip(0), atol=1e-5)
    surgery.remove(model)
    assert torch.equal(model(x), base)
