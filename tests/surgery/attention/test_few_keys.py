"""Tests of virtual keys added in training: values and gradients are those of one softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgery.attention import virtual_keys
from surgery.attention.virtual_keys import virtual_tokens

HEADS, GROUPS, KEYS, WIDTH, SCALE = 4, 2, 3, 5, 0.4


def inputs(batch: int, n: int) -> list[Tensor]:
    """Merged heads, query, lse, keys and values."""
    torch.manual_seed(0)
    shapes = [(batch, n, HEADS * WIDTH), (batch, HEADS, n, WIDTH), (batch, HEADS, n)]
    shapes += [(GROUPS, KEYS, WIDTH)] * 2
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def few(*given: Tensor) -> Tensor:
    return virtual_tokens(*given, scale=SCALE)


def by_definition(
    merged: Tensor, query: Tensor, lse: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """One softmax over the virtual scores and over one key for all others, head by head."""
    heads = []
    for head, f in enumerate(merged.split(WIDTH, -1)):
        group = head // (HEADS // GROUPS)
        scores = SCALE * query[:, head] @ keys[group].T  # (B, n, P)
        weights = torch.cat([scores, lse[:, head, :, None]], -1).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        heads.append(weights[..., :-1] @ values[group] + weights[..., -1:] * f)
    return torch.cat(heads, -1)


@pytest.mark.parametrize(("batch", "n"), [(1, 1), (1, 4), (3, 1), (2, 4), (0, 2)])
def test_values_and_gradients_are_those_of_one_softmax(batch: int, n: int) -> None:
    given = inputs(batch, n)
    ours, plain = few(*given), by_definition(*given)
    assert torch.allclose(ours, plain, rtol=0, atol=1e-12)
    weight = torch.randn_like(ours)
    found, expected = (torch.autograd.grad((y * weight).sum(), given) for y in (ours, plain))
    assert all(
        torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, expected, strict=True)
    )


def test_a_second_derivative_goes_through_the_weights() -> None:
    given = inputs(2, 2)
    assert torch.autograd.gradcheck(few, given)
    assert torch.autograd.gradgradcheck(few, given)


def test_a_query_that_sees_no_other_key_has_the_virtual_ones_alone() -> None:
    given = inputs(1, 2)
    with torch.no_grad():
        given[2][..., 0] = float("-inf")
    few(*given).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in given)
    with torch.no_grad():
        others = [torch.zeros_like(given[0]), *given[1:]]
        assert torch.allclose(few(*given)[:, 0], few(*others)[:, 0])


def test_transforms_of_torch_func_see_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(1, 2)

    def total(keys: Tensor) -> Tensor:
        return few(*given[:3], keys, given[4]).sum()

    (expected,) = torch.autograd.grad(total(given[3]), given[3])
    monkeypatch.setattr(virtual_keys.few_keys, "add_few_keys", None)  # would not be callable
    assert torch.allclose(torch.func.grad(total)(given[3].detach()), expected)
    _, along = torch.func.jvp(total, (given[3].detach(),), (torch.ones_like(given[3]),))
    assert torch.allclose(along, expected.sum())
