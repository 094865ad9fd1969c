"""Code runs as if a weight were W + L R, however it uses the weight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401 (defines the operator of its fallback)
from torch import Tensor, nn

from surgery.interop.updated_weights import UpdatedWeight, updated_weight

FALLBACK = torch.ops.transformers.grouped_mm_fallback
E, IN, OUT = 4, 8, 12
X, Z = torch.randn(5, IN), torch.randn(5, OUT)
ENDS = torch.tensor([1, 3, 3, 5], dtype=torch.int32)  # the third expert has no row
CHOSEN = torch.tensor([0, 0, 2, 3, 1])

USES: dict[str, Callable[[Any], Any]] = {
    "loop, matmul": lambda w: X @ w[2],
    "loop, tensor index": lambda w: F.linear(Z, w[torch.tensor(2)]),
    "linear with a bias": lambda w: F.linear(Z, w[1], torch.ones(IN)),
    "linear by name": lambda w: F.linear(input=Z, weight=w[1]),
    "mm": lambda w: torch.mm(X, w[0]),
    "gathered": lambda w: torch.bmm(X.unsqueeze(1), w[CHOSEN]),
    "gathered, in front": lambda w: torch.bmm(w[CHOSEN], Z.unsqueeze(-1)),
    "gathered, front and mT": lambda w: w[2].T @ X.T,
    "every expert": lambda w: X.expand(E, 5, IN) @ w,
    "grouped": lambda w: F.grouped_mm(X, w, offs=ENDS),
    "grouped, transposed": lambda w: F.grouped_mm(Z, w.transpose(-2, -1), offs=ENDS),
    "grouped by transformers": lambda w: FALLBACK(X, w, offs=ENDS),
    "slice": lambda w: X @ w[1:3],
    "unbind": lambda w: X @ w.unbind()[3],
    "iteration": lambda w: [X @ each for each in w][1],
    "select": lambda w: X @ w.select(0, 1),
    "index_select": lambda w: X @ torch.index_select(w, 0, CHOSEN),
    "permute": lambda w: Z @ w.permute(0, 2, 1)[1],
    "a cast that changes nothing": lambda w: X @ w.to(torch.float32).contiguous()[1],
    "a cast": lambda w: (X.double() @ w.double()[1]).float(),
    "einsum": lambda w: torch.einsum("bi,eio->beo", X, w),
    "baddbmm": lambda w: torch.baddbmm(torch.ones(E, 5, OUT), X.expand(E, 5, IN), w),
    "a part of each matrix": lambda w: w[1, 2:],
    "sum": lambda w: w.sum(),
    "arithmetic": lambda w: 1 - w * 2,
}  # fmt: skip


def parts() -> tuple[nn.Parameter, Tensor, Tensor]:
    return nn.Parameter(torch.randn(E, IN, OUT)), torch.randn(E, IN, 3), torch.randn(E, 3, OUT)


@pytest.mark.parametrize("use", USES)
def test_each_use_is_that_of_the_sum(use: str) -> None:
    weight, left, right = parts()
    with updated_weight(weight, left, right):
        found = USES[use](weight)
    assert type(found) is Tensor
    torch.testing.assert_close(found, USES[use](weight + left @ right), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use", USES)
def test_two_updates_of_a_weight_add_up(use: str) -> None:
    weight, left, right = parts()
    _, more, yet = parts()
    with updated_weight(weight, left, right), updated_weight(weight, more, yet):
        found = USES[use](weight)
    whole = weight + left @ right + more @ yet
    torch.testing.assert_close(found, USES[use](whole), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("use", ["loop, matmul", "gathered", "grouped", "grouped, transposed"])
def test_gradients_are_those_of_the_sum_and_no_sum_is_made(
    use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, left, right = parts()
    leaves = [left.requires_grad_(), right.requires_grad_()]
    expected = torch.autograd.grad(USES[use](weight + left @ right).square().sum(), leaves)
    monkeypatch.delattr(UpdatedWeight, "whole")
    with updated_weight(weight, left, right):
        found = torch.autograd.grad(USES[use](weight).square().sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_what_is_asked_of_the_weight_is_its_own() -> None:
    weight, left, right = parts()
    with updated_weight(weight, left, right):
        assert (weight.shape, weight.dtype, weight.size(-1)) == ((E, IN, OUT), torch.float32, OUT)
        assert len(weight) == E
        assert weight.device == torch.device("cpu")


def test_factors_in_float32_are_not_rounded_to_a_half_precision_base() -> None:
    weight, left, right = parts()
    weight.data = weight.bfloat16()
    with updated_weight(weight, left, right * 0 + 2**-10):
        found = X.bfloat16() @ weight[0]
    more = (X.bfloat16().float() @ left[0]) @ torch.full((3, OUT), 2**-10)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (X.bfloat16() @ weight[0]) + more.bfloat16())


def test_the_block_holds_for_its_thread_alone() -> None:
    weight, left, right = parts()
    seen: list[Tensor] = []
    with updated_weight(weight, left, right):
        other = threading.Thread(target=lambda: seen.append(X @ weight[0]))
        other.start()
        other.join()
    assert torch.equal(seen[0], X @ weight[0])
