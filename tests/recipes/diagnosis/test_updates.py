"""Norms and effective ranks, against dense matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery_recipes.diagnosis.updates import effective_rank, singular_values, updates
from tests.support.models import build, perturb


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_singular_values_are_those_of_the_product(r: int, d_in: int, d_out: int) -> None:
    a, b = torch.randn(r, d_in), torch.randn(r, d_out)
    expected = torch.linalg.svdvals(a.T @ b)
    found = singular_values(a, b)
    some = min(len(expected), len(found))
    torch.testing.assert_close(found[:some], expected[:some], rtol=1e-3, atol=1e-4)


def test_an_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1.0)


def test_updates_of_lora_and_of_what_has_no_factors() -> None:
    start = build("gpt2")
    surgery.splice(start, [surgery.method("lora", rank=2), surgery.method("ffn_adapter", rank=2)])
    end = copy.deepcopy(start)
    perturb(end, 0.1)
    found = {each.module: each for each in updates(start, end)}
    lora = end.transformer.h[0].attn.lora_query
    each = found["transformer.h.0.attn.lora_query"]
    dense = (lora.scale * lora.a.T @ lora.b).detach()
    assert each.norm == pytest.approx(float(dense.norm()), rel=1e-4)
    assert each.rank is not None
    assert 1 <= each.rank <= 2.0001
    before = start.transformer.h[0].attn.lora_query
    moved = sum(
        (p - q).detach().square().sum()
        for p, q in zip(lora.parameters(), before.parameters(), strict=True)
    )
    assert each.moved == pytest.approx(float(moved) ** 0.5, rel=1e-4)
    adapter = next(u for u in found.values() if "ffn_adapter" in u.module)
    assert (adapter.norm, adapter.rank) == (None, None)
    assert all(u.moved == 0 for u in updates(start, start))
