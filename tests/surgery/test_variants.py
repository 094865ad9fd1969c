"""A graph is one path through a forward: another path gets another graph, never the wrong one."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from tests.models import perturb


class Attention(nn.Module):
    """Attention over (B, n, 16) in 2 heads, with the odd habits that subclasses give it."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(16, 48), nn.Linear(16, 16)
        self.sharp = False

    def heads(self, x: Tensor) -> list[Tensor]:
        parts = self.inward(x).chunk(3, -1)
        return [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in parts]

    def merge(self, y: Tensor) -> Tensor:
        return self.outward(y.transpose(1, 2).flatten(2))


class BySize(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if x.shape[1] > 4:
            k = k * 2
        return self.merge(F.scaled_dot_product_attention(q, k, v))


class ByArgument(Attention):
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


class WithoutGradient(Attention):
    """A rotation-like factor, computed in three ways of saying that no gradient is wanted."""

    @torch.no_grad()
    def factor(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            a = x.cos().mean()
        return a + x.sin().mean()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        with torch.set_grad_enabled(False):
            b = x.mean()
        return self.merge(F.scaled_dot_product_attention(q * self.factor(q), k + b, v))


class ByData(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if q.mean() > 0:
            v = -v
        return self.merge(F.scaled_dot_product_attention(q, k, v))


class Packed(Attention):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        chunks = [torch.split(t, lengths.tolist(), dim=2) for t in self.heads(x)]
        mixed = [F.scaled_dot_product_attention(q, k, v) for q, k, v in zip(*chunks, strict=True)]
        return self.merge(torch.cat(mixed, 2))


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


def spliced(model: nn.Module, *example: Any) -> nn.Module:
    methods = [
        surgery.method("inducer", key_rank=2, value_rank=2),
        surgery.method("lora", rank=2, ports=("query", "value")),
    ]
    surgery.splice(model, methods, example_inputs=example)
    return model


def check(model: nn.Module, example: tuple[Any, ...], cases: list[Any]) -> None:
    """Every call gives the bits of the base; each is made twice, in turn."""
    expected = [model(*args, **kwargs) for args, kwargs in cases]
    spliced(model, *example)
    for _ in range(2):
        for (args, kwargs), output in zip(cases, expected, strict=True):
            assert torch.equal(model(*args, **kwargs), output)


def x(n: int = 5, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, 16)


def test_a_branch_on_a_size() -> None:
    model = BySize().eval()
    check(model, (x(),), [((x(n),), {}) for n in (3, 5, 4, 9)])
    assert [len(v) for v in surgery.variants(model).values()] == [2]


def test_a_branch_on_a_flag_a_string_and_an_attribute() -> None:
    model = ByArgument().eval()
    check(model, (x(),), [((x(),), {}), ((x(), "causal"), {}), ((x(),), {"twice": True})])
    given = x()
    with surgery.disabled(model):
        model.sharp = True
        expected = model(given)
    assert torch.equal(model(given), expected)


def test_a_branch_on_what_an_argument_is() -> None:
    given = x()
    calls: list[Any] = [False, given, True, x(), Style.SOFT, Style.SHARP, given, False]
    check(ByKind().eval(), (x(),), [((given, other), {}) for other in calls])


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
    model, given = spliced(ByConfig().eval(), x()), x()
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
    check(model, (x(),), [((x() + shift,), {}) for shift in (-3.0, 3.0, 0.5, -0.5)])
    assert [len(v) for v in surgery.variants(model).values()] == [2]


def test_chunks_of_a_packed_sequence_are_one_site() -> None:
    model = Packed().eval()
    example = (x(7, 1), torch.tensor([3, 4]))
    assert len(surgery.locate(model, example)) == 1
    cases = [((x(7, 1), torch.tensor(n)), {}) for n in ([3, 4], [2, 2, 3], [7], [4, 3])]
    check(model, example, cases)


@torch.no_grad()
def test_a_packed_sequence_equals_its_chunks_alone() -> None:
    model = spliced(Packed().eval(), x(7, 1), torch.tensor([3, 4]))
    perturb(model)
    whole = x(9, 1)
    together = model(whole, torch.tensor([2, 3, 4]))
    parts = [model(part, torch.tensor([part.shape[1]])) for part in whole.split([2, 3, 4], 1)]
    torch.testing.assert_close(together, torch.cat(parts, 1), rtol=1e-5, atol=1e-6)


def test_a_branch_behind_a_cache_update_is_an_error_that_names_the_line() -> None:
    torch.manual_seed(0)
    model, given = ByCachedData().eval(), x(4)
    spliced(model, given, Store())

    def both_branches() -> None:
        for scale in (1.0, -1.0, 5.0, -5.0):
            model(given * scale, Store())

    with pytest.raises(surgery.SurgeryError, match=r"test_variants\.py:\d+"):
        both_branches()


def test_a_call_pattern_without_end_is_reported() -> None:
    class Endless(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            return self.merge(F.scaled_dot_product_attention(q, k, v)) * int(x.shape[1])

    model = spliced(Endless().eval(), x())

    def many_lengths() -> None:
        for n in range(1, 30):
            model(x(n))

    with pytest.warns(UserWarning, match=r"24 variants of one host.*surgery\.variants"):
        many_lengths()


@pytest.mark.parametrize("first", [True, False])
def test_a_region_without_gradient_gives_the_mode_back_that_it_found(first: bool) -> None:
    torch.manual_seed(0)
    model, x = WithoutGradient(), torch.randn(2, 3, 16)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    with torch.set_grad_enabled(first):  # the mode that the graph is captured in
        surgery.splice(model, surgery.method("lora", rank=2), example_inputs=x)
    assert torch.is_grad_enabled()
    for mode in (True, False, True):
        with torch.set_grad_enabled(mode):
            assert model(x).requires_grad == mode
            assert torch.is_grad_enabled() == mode
    own = [p for n, p in model.named_parameters() if "lora" not in n]
    gradients = torch.autograd.grad(model(x).sum(), own)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_a_splice_does_not_hang_on_the_point_at_which_it_is_tried(seed: int) -> None:
    """The branch depends on what is inserted: somewhere near the start it is still the same."""
    torch.manual_seed(seed)
    for model, given in ((ByData(), (x(),)), (ByCachedData(), (x(4), Store()))):
        spliced(model.eval(), *given)
