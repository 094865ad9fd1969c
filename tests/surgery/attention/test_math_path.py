"""Tests of the softmax and logsumexp that share one gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgery.attention.math_path import normalised


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("finite", [True, False])
def test_softmax_and_logsumexp_have_one_gradient(used: tuple[int, ...], finite: bool) -> None:
    torch.manual_seed(0)
    scores = (torch.randn(2, 3, 5, dtype=torch.float64) * 3).requires_grad_()

    def ours(s: Tensor) -> tuple[Tensor, ...]:
        made = normalised(s, finite)
        return tuple(made[i] for i in used)

    def plain(s: Tensor) -> tuple[Tensor, ...]:
        made = s.softmax(-1), s.logsumexp(-1)
        return tuple(made[i] for i in used)

    pairs = zip(ours(scores), plain(scores), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs)
    assert torch.autograd.gradcheck(ours, scores)
    assert torch.autograd.gradgradcheck(ours, scores)


def test_a_row_without_any_score_weighs_nothing() -> None:
    scores = torch.tensor([[1.0, 2.0], [float("-inf")] * 2], requires_grad=True)
    weights, lse = normalised(scores)
    assert lse[1] == float("-inf")
    assert not weights[1].any()
    (weights.sum() + lse[0]).backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
