"""A captured forward does what the forward itself does, to its arguments and buffers as well."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from tests.support.forwards import Attention, pair, tokens
from tests.support.splices import untouched


class Counts(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)  # type: ignore[operator]
        return super().forward(self.norm(x.mT).mT)


def test_buffers_that_a_forward_writes_to_move_with_its_calls_alone() -> None:
    base, model = pair(Counts)
    for each in (base, model):
        each.train()
        for _ in range(2):
            each(tokens())
    ours = dict(model.named_buffers())
    assert all(torch.equal(ours[name], buffer) for name, buffer in base.named_buffers())
    assert int(ours["calls"]) == int(ours["norm.num_batches_tracked"]) == 2


class InPlace(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None, first: bool = False) -> Tensor:
        if first:
            x[:, 0] = x[:, 0] * 3
        if mask is not None:
            mask += 1
        return super().forward(x)


def test_what_a_forward_writes_to_its_arguments_is_written_once() -> None:
    base, model = pair(InPlace)
    marks = torch.zeros(3), torch.zeros(3)
    for _ in range(2):
        given = tokens(), tokens()
        made = [m(g, k, True) for m, g, k in zip((base, model), given, marks, strict=True)]
        assert torch.equal(*made)
        assert torch.equal(*given)
        assert torch.equal(*marks)


class PlainCache(Attention):
    def forward(self, x: Tensor, past: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = self.heads(x)
        if past is not None:
            k = torch.cat([past["k"], k], 2) if "k" in past else k
            past["k"] = v = k
        return self.merge(F.scaled_dot_product_attention(q, k, v))


def test_a_dict_that_a_forward_fills_is_refused() -> None:
    _, model = pair(PlainCache)
    with pytest.raises(surgery.ForwardError, match="changes a dict among its arguments"):
        model(tokens(), {})


class Brancher(nn.Module):
    """Attention whose forward does what a graph cannot hold: it stores a tensor on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        numbers = k.tolist()
        self.seen = len(numbers)
        y = torch.softmax(q @ k.mT * 0.5, -1) @ v
        return self.out(y.transpose(1, 2).flatten(2)) * type(numbers[0][0][0][0])(0.5)


def test_a_forward_that_cannot_be_captured_names_file_and_line() -> None:
    model = nn.ModuleList([Brancher()])
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    with pytest.raises(surgery.CaptureError, match=r"Brancher at 0.*\n.*test_forward\.py:\d+"):
        surgery.splice(model, surgery.method("lora"), example_inputs=torch.randn(1, 3, 8))
    assert untouched(model)


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
