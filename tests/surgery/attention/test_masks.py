"""Tests of surgery.masks: what is kept of a mask is what the mask says now, and goes with it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery.attention import masks
from surgery.attention.masks import kernel_mask
from surgery.attention.sdpa import attention, dense_lse

INF = float("inf")


def seen(n: int = 4, m: int = 6, left: int = 0) -> Tensor:
    mask = torch.ones(2, 1, n, m, dtype=torch.bool).tril(m - n)
    mask[1, ..., :left] = False
    return mask


@given(
    boolean=st.booleans(),
    steps=st.lists(st.tuples(st.integers(0, 47), st.booleans(), st.booleans()), max_size=6),
)
def test_context_and_lse_follow_what_is_written_to_a_mask(
    boolean: bool, steps: list[tuple[int, bool, bool]]
) -> None:
    mask = seen() if boolean else torch.zeros(2, 1, 4, 6)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    for place, shown, grad in steps:
        mask.view(-1)[place] = shown if boolean else (0.5 if shown else -INF)
        with torch.set_grad_enabled(grad):
            context, lse = attention(q, k, v, mask)
        assert torch.equal(context, F.scaled_dot_product_attention(q, k, v, mask))
        torch.testing.assert_close(lse, dense_lse(q, k, mask), rtol=1e-5, atol=1e-5)


def test_a_mask_is_worked_out_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    tell = masks._kernel_mask
    monkeypatch.setattr(masks, "_kernel_mask", lambda *a, **k: made.append(1) or tell(*a, **k))
    mask = seen(left=6)
    single, half = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 8, dtype=torch.bfloat16)
    first, second = (kernel_mask(mask, False, single) for _ in range(2))
    assert first[0] is second[0]
    assert first[2] is second[2]
    assert len(made) == 1
    kernel_mask(mask, False, half)
    mask[...] = True
    assert kernel_mask(mask, False, half)[2] is None
    assert len(made) == 3


@pytest.mark.parametrize("kind", ["boolean", "additive", "long"])
def test_what_is_kept_goes_with_its_mask(kind: str) -> None:
    mask = torch.ones(1, 1, 1100, 1100, dtype=torch.bool).tril() if kind == "long" else seen()
    mask = mask if kind == "boolean" else torch.zeros(mask.shape).masked_fill(~mask, -INF)
    additive, is_causal, _ = kernel_mask(mask, False, torch.zeros(2, 3, 4, 8))
    assert additive is not None
    assert (additive is mask) == (kind == "additive")
    assert is_causal == (kind == "long")
    kept, gone = len(masks._known), weakref.ref(mask)
    del additive, mask
    gc.collect()
    assert gone() is None
    assert len(masks._known) == kept - 1


def test_nothing_of_inference_mode_is_kept() -> None:
    mask, q = seen(4, 4), torch.randn(2, 3, 4, 8)
    with torch.inference_mode():
        attention(q, q, q, mask)
    q.requires_grad_()
    attention(q, q, q, mask)[0].sum().backward()
    assert q.grad is not None
    with torch.inference_mode():
        own = seen(4, 4)
        attention(q, q, q, own)
        own[...] = False
        assert (attention(q, q, q, own)[1] == -INF).all()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rows", [4, 1])
def test_a_mask_beside_the_causal_flag_is_heard(rows: int, grad: bool) -> None:
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    mask = seen(left=2)[..., -rows:, :]
    with torch.set_grad_enabled(grad):
        context, lse = attention(q, k, v, mask, is_causal=True)
        try:
            expected = F.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
        except RuntimeError:  # torch 2.14 refuses both together
            both = mask & torch.ones(4, 6, dtype=torch.bool).tril()
            expected = F.scaled_dot_product_attention(q, k, v, both)
            torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, dense_lse(q, k, mask, is_causal=True), rtol=1e-5, atol=1e-5)
    assert (lse[1, :, :2] == -INF).all()
