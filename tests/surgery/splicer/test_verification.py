"""A splice that is not what its method declares is found out and undone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import SpliceError
from tests.support.custom_methods import Custom, Scaled, Shared, Shift, insert
from tests.support.models import build, inputs, logits, perturb
from tests.support.splices import Named, methods, untouched


@dataclass(frozen=True)
class Loud(surgery.Method):
    """Declares an exact start and does not keep it."""

    name = "loud"

    def splice(self, site: surgery.Site) -> None:
        site.port("output").add(nn.Linear(site.width, site.width), "loud", reads=("output",))


@dataclass(frozen=True)
class Idle(surgery.Method):
    """Inserts a parameter that nothing reads."""

    name = "idle"

    def splice(self, site: surgery.Site) -> None:
        class Same(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(2))

            def forward(self, x: Tensor) -> Tensor:
                return x

        site.port("output").insert(Same(), "idle")


@dataclass(frozen=True)
class Nothing(surgery.Method):
    """Does nothing."""

    name = "nothing"

    def splice(self, site: surgery.Site) -> None:
        pass


@pytest.mark.parametrize(
    ("method", "part"),
    [(Loud(), "declares start 'exact'"), (Idle(), "idle_output"), (Nothing(), "inserted nothing")],
)
def test_a_splice_that_is_not_what_it_says_is_undone(method: surgery.Method, part: str) -> None:
    model, case = build("llama"), inputs("llama")
    expected, keys = logits(model, case), list(model.state_dict())
    with pytest.raises(surgery.SpliceError, match=part):
        surgery.splice(model, [surgery.method("lora"), method])
    assert untouched(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, case), expected)


@pytest.mark.parametrize("declared", ["exact", "gated"])
@pytest.mark.parametrize("factor", ["2", "nan", "inf"])
@pytest.mark.parametrize(
    "beside", [[], [("ffn_adapter", {"placement": "block"})], [("prefix", {})]]
)
@pytest.mark.few(14)
def test_a_start_that_is_none_is_found_out(
    declared: surgery.Start, factor: str, beside: list[Named]
) -> None:
    model = build("roberta")
    with pytest.raises(SpliceError, match=f"declares start '{declared}'"):
        surgery.splice(model, [Scaled(factor=factor, declared=declared), *methods(*beside)])
    assert not surgery.summary(model).reports


def test_a_network_that_all_layers_share_may_start_at_zero() -> None:
    model, x = build("gpt2"), inputs("gpt2")
    expected = logits(model, x)
    surgery.splice(model, Custom(lambda site: site.port("output").insert(Shared(site), "x")))
    assert torch.equal(logits(model, x), expected)
    perturb(model)
    moved = logits(model, x)
    surgery.merge(model)
    torch.testing.assert_close(logits(model, x), moved, rtol=1e-4, atol=1e-5)


def test_what_works_only_together_is_verified_alone_where_there_is_no_trunk() -> None:
    @dataclass(frozen=True)
    class Together(Custom):
        together = True

    class Unused(Shift):
        def forward(self, h: Tensor) -> Any:
            return h

    model = build("gpt2")
    act = insert(Unused())
    for at in (None, list(surgery.locate(model).ffn)[:1]):
        with pytest.raises(surgery.SpliceError, match="x_output"):
            surgery.splice(model, Together(act, "none"), at=at)
