"""Tests of forwards that branch: each path gets a graph of its own, never a wrong one."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import surgery
from tests.support.forwards import Attention, check, drawn, pair, tokens, with_two_methods


class BySize(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if x.shape[1] > 4:
            k = k * 2
        return self.merge(F.scaled_dot_product_attention(q, k, v))


class ByArgument(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.sharp = False

    def forward(self, x: Tensor, mode: str = "plain", twice: bool = False) -> Tensor:
        q, k, v = self.heads(x)
        if mode == "causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, scale=1.0 if self.sharp else None)
        return self.merge(y) * (2 if twice else 1)


class Style(str, enum.Enum):
    """Strings by another type, as configs hold them."""

    SOFT, SHARP = "soft", "sharp"


class ByKind(Attention):
    """What a second argument is decides: a tensor, the first one again, a flag or a style."""

    def forward(self, x: Tensor, other: Any = False) -> Tensor:
        q, k, v = self.heads(x)
        scale = 1.0 if other is True or other is Style.SHARP else None
        y = self.merge(F.scaled_dot_product_attention(q, k, v, scale=scale))
        return y + other if isinstance(other, Tensor) else y


class ByData(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if q.mean() > 0:
            v = -v
        return self.merge(F.scaled_dot_product_attention(q, k, v))


class Store(list):  # type: ignore[type-arg]
    """A cache, as opaque as any."""

    def update(self, new: Tensor) -> Tensor:
        self.append(new)
        return torch.cat(list(self), 2)


class ByCachedData(Attention):
    def forward(self, x: Tensor, past: Any) -> Tensor:
        q, k, _ = self.heads(x)
        k = past.update(k)
        if k.sum() > 0:
            q = q * 2
        return self.merge(F.scaled_dot_product_attention(q, k, k))


def test_a_branch_on_a_size() -> None:
    model = BySize().eval()
    check(model, (drawn(),), [((drawn(n),), {}) for n in (3, 5, 4, 9)])
    assert [len(v) for v in surgery.variants(model).values()] == [2]


def test_a_branch_on_a_flag_a_string_and_an_attribute() -> None:
    model = ByArgument().eval()
    check(
        model,
        (drawn(),),
        [((drawn(),), {}), ((drawn(), "causal"), {}), ((drawn(),), {"twice": True})],
    )
    given = drawn()
    with surgery.disabled(model):
        model.sharp = True
        expected = model(given)
    assert torch.equal(model(given), expected)


def test_a_branch_on_what_an_argument_is() -> None:
    given = drawn()
    calls: list[Any] = [False, given, True, drawn(), Style.SOFT, Style.SHARP, given, False]
    check(ByKind().eval(), (drawn(),), [((given, other), {}) for other in calls])


@dataclass
class Settings:
    twice: bool = False


class ByConfig(Attention):
    """A flag that stands in a config, as models written with a dataclass have it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Settings()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(F.scaled_dot_product_attention(q * 2 if self.config.twice else q, k, v))


def test_a_branch_on_a_config() -> None:
    model, given = with_two_methods(ByConfig().eval(), drawn()), drawn()
    with surgery.disabled(model):
        once = model(given)
        model.config.twice = True
        twice = model(given)
    assert torch.equal(model(given), twice)
    model.config.twice = False
    assert torch.equal(model(given), once)
    assert [len(v) for v in surgery.variants(model).values()] == [2]


def test_a_branch_on_data() -> None:
    model = ByData().eval()
    check(model, (drawn(),), [((drawn() + shift,), {}) for shift in (-3.0, 3.0, 0.5, -0.5)])
    assert [len(v) for v in surgery.variants(model).values()] == [2]


def test_a_branch_behind_a_cache_update_is_an_error_that_names_the_line() -> None:
    torch.manual_seed(0)
    model, given = ByCachedData().eval(), drawn(4)
    with_two_methods(model, given, Store())

    def both_branches() -> None:
        for scale in (1.0, -1.0, 5.0, -5.0):
            model(given * scale, Store())

    with pytest.raises(surgery.SurgeryError, match=r"test_branches\.py:\d+"):
        both_branches()


@pytest.mark.parametrize("seed", range(6))
def test_a_splice_does_not_hang_on_the_point_at_which_it_is_tried(seed: int) -> None:
    """The branch depends on what is inserted: somewhere near the start it is still the same."""
    torch.manual_seed(seed)
    for model, given in ((ByData(), (drawn(),)), (ByCachedData(), (drawn(4), Store()))):
        with_two_methods(model.eval(), *given)


class WrittenOut(Attention):
    def forward(self, x: Tensor, n: float = 1) -> Tensor:
        return super().forward(x) * float(str(n)) * float("%s" % n) * float(repr(n))  # noqa: UP031


@torch.no_grad()
def test_a_number_that_is_written_out_chooses_the_graph() -> None:
    base, model = pair(WrittenOut)
    for n in (1, 2, 2.5, 1):
        assert torch.equal(model(tokens(), n), base(tokens(), n))
