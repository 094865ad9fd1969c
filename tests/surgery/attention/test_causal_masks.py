"""Tests of surgery.causal: what a mask hides, and that skipping it keeps every bit of SDPA's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.attention import kernels
from surgery.attention.masks import hides_all_keys, split_causal
from surgery.attention.sdpa import attention, dense_lse

INF = float("inf")


def padded(n: int, m: int, left: int = 0, right: int = 0) -> Tensor:
    """Which keys (1, 1, n, m) a query sees: none after it, and no padding."""
    seen = torch.ones(1, 1, n, m, dtype=torch.bool).tril()
    seen[..., :left] = False
    seen[..., m - right :] = False
    return seen


def additive(seen: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -INF)


@settings(max_examples=max(40, settings().max_examples))
@given(
    n=st.integers(1024, 1400),
    m=st.integers(1024, 1400),
    query=st.integers(0, 1399),
    key=st.integers(0, 1399),
    bias=st.sampled_from([0.0, -3.0, torch.finfo(torch.float32).min, float("nan")]),
)
def test_one_later_key_that_is_not_hidden_is_found(
    n: int, m: int, query: int, key: int, bias: float
) -> None:
    mask = additive(padded(n, m, left=5, right=9))
    assert split_causal(mask)[1]
    query, key = query % n, key % m
    mask[..., query, key] = bias
    assert split_causal(mask)[1] == (key <= query)


@settings(max_examples=max(40, settings().max_examples))
@given(
    boolean=st.booleans(),
    n=st.integers(1024, 1400),
    m=st.integers(1024, 1400),
    query=st.integers(0, 1399),
    key=st.integers(0, 1399),
)
def test_one_row_stands_for_a_mask_only_if_it_says_the_same(
    boolean: bool, n: int, m: int, query: int, key: int
) -> None:
    mask = padded(n, m, left=5, right=9)
    mask = mask if boolean else additive(mask)
    row, causal = split_causal(mask)
    assert causal
    assert row.shape == (1, 1, 1, m)
    query, key = query % n, key % m
    before = mask[..., query, key]
    mask[..., query, key] = ~before if boolean else before.clamp(min=-9.0) + 1.0
    row, causal = split_causal(mask)
    later = torch.ones(n, m, dtype=torch.bool).triu(1)
    hidden = False if boolean else -INF
    said = row.expand_as(mask).masked_fill(later, hidden) if causal else mask
    assert torch.equal(said, mask)


def test_a_short_mask_is_not_worth_looking_at() -> None:
    assert not split_causal(additive(padded(512, 512)))[1]
    assert not split_causal(additive(padded(1, 4096)))[1]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """The causal flag, and how many rows of a mask, that the kernel on the CPU is called with."""
    seen: list[tuple[bool, int]] = []
    kernel = kernels.flash_on_cpu

    def spy(*args: Any, **options: Any) -> Any:
        mask = options["attn_mask"]
        if mask is not None:  # a trial of grouped heads has none
            seen.append((args[4], mask.shape[-2]))
        return kernel(*args, **options)

    monkeypatch.setattr(kernels, "flash_on_cpu", spy)
    return seen


@pytest.mark.parametrize("kind", ["boolean", "additive", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "left", "right"), [(1100, 0, 70), (1100, 300, 0), (1500, 7, 400)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.few(16)
def test_what_is_skipped_changes_no_bit(
    told: list[tuple[bool, int]],
    dtype: torch.dtype,
    kind: str,
    m: int,
    left: int,
    right: int,
    groups: int,
) -> None:
    torch.manual_seed(0)
    seen = padded(1100, m, left, right)
    mask = seen if kind == "boolean" else additive(seen, dtype)
    if kind == "biased":
        mask = mask + torch.randn(1100, m).to(dtype)
    heads = [2 * groups, 2, 2]
    inputs = [
        torch.randn(1, h, n, 8).to(dtype).requires_grad_()
        for h, n in zip(heads, (1100, m, m), strict=True)
    ]
    grouped = {"enable_gqa": groups > 1}
    expected = F.scaled_dot_product_attention(*inputs, mask, **grouped)
    context, lse = attention(*inputs, mask, **grouped)
    assert told == [(True, 1100 if kind == "biased" else 1)]
    assert torch.equal(context, expected)
    dense = dense_lse(inputs[0], inputs[1], mask)
    torch.testing.assert_close(lse, dense, rtol=1e-4, atol=1e-4)
    seed = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((x * seed).sum(), inputs) for x in (context, expected))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("mask", ["later", "window"])
def test_a_mask_that_shows_later_keys_keeps_them(told: list[tuple[bool, int]], mask: str) -> None:
    seen = padded(1100, 1100)
    if mask == "later":
        seen[..., 500, 501] = True
    else:
        seen = torch.ones(1, 1, 1100, 1100, dtype=torch.bool).tril(9)
    q, k, v = (torch.randn(1, 2, 1100, 8) for _ in range(3))
    assert torch.equal(attention(q, k, v, seen)[0], F.scaled_dot_product_attention(q, k, v, seen))
    assert told == [(False, 1100)]


def test_queries_that_see_no_key_are_told_from_those_that_see_one() -> None:
    mask = additive(padded(6, 6, left=2))
    assert hides_all_keys(mask).flatten().tolist() == [True, True, False, False, False, False]
    assert hides_all_keys(mask[..., :0]).all()
    row = mask[..., -1:, :]
    assert torch.equal(hides_all_keys(row, 6), hides_all_keys(mask))
    assert hides_all_keys(row[..., :3], 6).flatten().tolist() == [True, True] + 4 * [False]
