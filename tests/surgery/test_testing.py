"""Tests of the contract itself: it finds in a method what a splice cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.plugin.registry import Registry, registry
from surgery.testing import check_method
from tests.support.custom_methods import Custom, insert


class Sink(nn.Module):
    """Attention with a sink that starts without weight; wrong where a query sees no key."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(heads))

    def forward(self, merged: Tensor, lse: Tensor) -> Tensor:
        share = 1 / (1 + self.g[:, None] * torch.exp(-lse))  # (B, H, n)
        heads = merged.unflatten(-1, (share.shape[1], -1))
        return (heads * share.mT.unsqueeze(-1)).flatten(-2)


class Drawn(nn.Module):
    """``h + r w`` with an r that is drawn and not saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width))
        self.register_buffer("r", torch.randn(width), persistent=False)

    def forward(self, h: Tensor) -> Any:
        return h + self.w * self.r


@dataclass(frozen=True)
class Sinks(surgery.Method):
    """See Sink."""

    name = "sinks"

    def splice(self, site: surgery.Site) -> None:
        site.port("merged").replace(Sink(site.heads), self.name, reads=("merged", "lse"))


@dataclass(frozen=True)
class Draws(surgery.Method):
    """See Drawn."""

    name = "draws"
    kinds = ("ffn",)

    def splice(self, site: surgery.Site) -> None:
        site.port("output").insert(Drawn(site.width), self.name)


@pytest.mark.parametrize(
    ("method", "what"),
    [
        (Sinks(), "start is as declared: .*left padding"),
        (Draws(), "saved and loaded is the same: the loaded adapter gives other bits"),
        (Custom(insert(nn.Identity())), "gradients reach .*RuntimeError: element 0 of tensors"),
    ],
)
@pytest.mark.few(2)
def test_the_contract_finds_what_a_splice_cannot(
    method: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = {**surgery.methods(), method.name: type(method)}
    monkeypatch.setattr(Registry, "methods", lambda self: offered)
    monkeypatch.setitem(registry()._offered["method"], method.name, (type(method), "tests"))
    with pytest.raises(AssertionError, match=rf"(?s)on fused: {what}"):
        check_method(method)
