"""Tests of with_lse: an attention function of a library also returns its logsumexp."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sink_attention
from transformers.models.llama.modeling_llama import eager_attention_forward

import surgery
from surgery.attention.library_functions import with_lse
from tests.support.attention import additive, by_loop, heads, holes


def layer(groups: int = 2) -> Any:
    """What transformers' attention functions ask of the module that they are called for."""
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)
    facts = {"num_key_value_groups": groups, "is_causal": True, "training": False}
    return SimpleNamespace(**facts, sinks=sinks)


@pytest.mark.parametrize("function", [sdpa_attention_forward, eager_attention_forward])
def test_with_lse_returns_what_the_function_does_and_its_lse(function: Any) -> None:
    q, k, v = heads(5, 5, h=4, g=2)
    mask = additive(holes(5, 5))
    expected = function(layer(), q, k, v, mask, scaling=0.4, dropout=0.0)
    result, lse = with_lse(function)(layer(), q, k, v, mask, scaling=0.4, dropout=0.0)
    assert torch.equal(result[0], expected[0])
    torch.testing.assert_close(lse, by_loop(q, k, v, mask, scale=0.4)[1], rtol=0, atol=1e-12)


def plain_sink_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """An appended sink column, without a shift of the scores."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    sinks = module.sinks.view(1, -1, 1, 1).expand(*q.shape[:3], 1)
    weights = torch.cat([q @ k.mT * scaling + mask, sinks], -1).softmax(-1)[..., :-1]
    return (weights @ v).transpose(1, 2), weights


@pytest.mark.parametrize("function", [plain_sink_attention, sink_attention])
def test_with_lse_counts_a_learned_sink(function: Any) -> None:
    q, k, v = heads(5, 5, h=4, g=2)
    mask = additive(holes(5, 5))
    expected = function(layer(), q, k, v, mask, scaling=0.4)
    result, lse = with_lse(function)(layer(), q, k, v, mask, scaling=0.4)
    assert torch.equal(result[0], expected[0])
    bare = by_loop(q, k, v, mask, scale=0.4)[1]
    total = torch.logaddexp(bare, layer().sinks.view(1, 4, 1))
    torch.testing.assert_close(lse, total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [sdpa_attention_forward, sink_attention])
def test_with_lse_passes_the_gradients_of_finite_differences(function: Any) -> None:
    inputs = [x.requires_grad_() for x in heads(3, 3, h=4, g=2, d=3, b=1)]

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        result, lse = with_lse(function)(layer(), q, k, v, None, scaling=0.4, dropout=0.0)
        return result[0], lse

    assert torch.autograd.gradcheck(both, inputs, fast_mode=True)


def test_with_lse_says_that_a_function_shows_no_softmax() -> None:
    def linear(module: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.mT @ v)

    with pytest.raises(surgery.ForwardError, match="linear shows neither a softmax nor"):
        with_lse(linear)(None, *heads(3, 3))


def either(module: Any, query: Tensor, key: Tensor, value: Tensor, plain: bool) -> Tensor:
    if plain:
        return torch.softmax(query @ key.mT, -1) @ value
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)


def test_a_function_may_use_sdpa_in_one_branch_and_a_softmax_in_another() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    both = with_lse(either)
    for plain in (False, True):
        _, lse = both(None, q, k, v, plain)
        torch.testing.assert_close(lse, (q @ k.mT).logsumexp(-1))
