"""Tests of attention() against loops over the equations, finite differences and PyTorch's SDPA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery.attention.sdpa import attention, dense_lse, logsumexp
from tests.support.attention import INF, MASKS, additive, by_loop, heads, holes, masks


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("n", "m"), [(5, 5), (1, 6), (3, 7), (6, 4)])
def test_context_and_lse_follow_the_equations(mask: str, n: int, m: int) -> None:
    q, k, v = heads(n, m)
    options = masks(n, m)[mask]
    context, lse = attention(q, k, v, **options)
    expected_context, expected_lse = by_loop(q, k, v, **options)
    torch.testing.assert_close(context, expected_context, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)
    torch.testing.assert_close(dense_lse(q, k, **options), expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
def test_grouped_heads_read_the_key_head_of_their_group(mask: str) -> None:
    q, k, v = heads(4, 5, h=6, g=2)
    options = masks(4, 5)[mask]
    context, lse = attention(q, k, v, **options, enable_gqa=True)
    expected_context, expected_lse = by_loop(q, k, v, **options)
    torch.testing.assert_close(context, expected_context, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


@given(
    n=st.integers(1, 5), m=st.integers(1, 5), groups=st.integers(1, 2), causal=st.booleans(),
    d=st.integers(1, 5), magnitude=st.sampled_from([1e-3, 1.0, 40.0]),
)  # fmt: skip
def test_any_shape_and_magnitude_follows_the_equations(
    n: int, m: int, groups: int, causal: bool, d: int, magnitude: float
) -> None:
    q, k, v = heads(n, m, h=2 * groups, g=2, d=d, b=1)
    q = q * magnitude
    context, lse = attention(q, k, v, is_causal=causal, enable_gqa=groups > 1)
    expected_context, expected_lse = by_loop(q, k, v, is_causal=causal)
    torch.testing.assert_close(context, expected_context, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("n", "m", "h", "g"), [(3, 3, 2, 2), (2, 4, 2, 2), (4, 2, 2, 2), (3, 3, 4, 2)]
)
def test_gradients_are_those_of_finite_differences(
    mask: str, n: int, m: int, h: int, g: int
) -> None:
    inputs = [x.requires_grad_() for x in heads(n, m, h, g, d=3, b=1)]
    options = masks(n, m)[mask]
    if "attn_mask" in options:
        options["attn_mask"] = options["attn_mask"][:1]

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, **options, enable_gqa=h != g)

    assert torch.autograd.gradcheck(both, inputs, fast_mode=True)


@pytest.mark.parametrize("output", [0, 1])
def test_each_output_alone_has_the_gradients_of_finite_differences(output: int) -> None:
    inputs = [x.requires_grad_() for x in heads(3, 3, d=3, b=1)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, is_causal=True)[output], inputs)


def test_dropout_has_the_gradients_of_finite_differences_under_one_seed() -> None:
    inputs = [x.requires_grad_() for x in heads(3, 3, d=3, b=1)]

    def seeded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return attention(q, k, v, dropout_p=0.4, is_causal=True)

    assert torch.autograd.gradcheck(seeded, inputs, fast_mode=True)


def test_a_trained_additive_mask_gets_the_gradients_of_finite_differences() -> None:
    inputs = [*heads(3, 3, d=3, b=1), torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)]
    assert torch.autograd.gradcheck(attention, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("kind", ["boolean", "additive", "trained additive", "dropout", "grouped"])
def test_a_query_that_sees_nothing_has_context_zero_lse_minus_inf_and_finite_gradients(
    kind: str,
) -> None:
    h = 4 if kind == "grouped" else 2
    q, k, v = (x.requires_grad_() for x in heads(3, 4, h=h))
    seen = holes(3, 4)
    seen[1, :, 1] = False
    mask = additive(seen) if "additive" in kind else seen
    if kind == "trained additive":
        mask.requires_grad_()
    p = 0.3 if kind == "dropout" else 0.0
    context, lse = attention(q, k, v, mask, p, enable_gqa=kind == "grouped")
    assert torch.equal(context[1, :, 1], torch.zeros_like(context[1, :, 1]))
    assert (lse[1, :, 1] == -INF).all()
    assert lse[0].isfinite().all()
    gate = torch.sigmoid(-lse)  # lambda of an inducer, and how it reads lse
    gradients = torch.autograd.grad(context.sum() + gate.sum(), (q, k, v))
    assert all(x.isfinite().all() for x in gradients)


def test_the_lowest_number_as_a_mask_gives_finite_gradients() -> None:
    q, k, v = (x.float().requires_grad_() for x in heads(3, 4))
    mask = additive(holes(3, 4), torch.float32).clamp(min=torch.finfo(torch.float32).min)
    mask[1, :, 1] = torch.finfo(torch.float32).min
    context, lse = attention(q, k, v, mask)
    assert context.isfinite().all()
    gradients = torch.autograd.grad(context.sum() + lse.clamp(min=-1e4).sum(), (q, k, v))
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("h", [2, 4])
def test_context_has_the_bits_and_draws_of_sdpa(
    dtype: torch.dtype, mask: str, dropout: float, h: int
) -> None:
    q, k, v = heads(40, 40, h=h, d=16, dtype=dtype)
    options = masks(40, 40)[mask]
    if mask == "additive":
        options["attn_mask"] = options["attn_mask"].to(dtype)
    options |= {"dropout_p": dropout, "enable_gqa": h != 2}
    torch.manual_seed(3)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(attention(q, k, v, **options)[0], expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lse_stays_float32_under_narrow_types(dtype: torch.dtype, mask: str) -> None:
    q, k, v = heads(40, 40, d=16, dtype=dtype)
    options = masks(40, 40)[mask]
    wide = dict(options)
    if mask == "additive":
        options["attn_mask"] = options["attn_mask"].to(dtype)
        wide["attn_mask"] = options["attn_mask"].double()
    _, lse = attention(q, k, v, **options)
    assert lse.dtype == torch.float32
    expected = dense_lse(q.double(), k.double(), **wide)
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=1e-4)


def test_logsumexp_of_nothing_is_minus_inf_with_gradient_zero() -> None:
    scores = torch.tensor([[-INF, -INF], [0.0, -INF]], requires_grad=True)
    lse = logsumexp(scores)
    assert torch.equal(lse.detach(), torch.tensor([-INF, 0.0]))
    lse[1].backward()
    assert torch.equal(scores.grad, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_without_any_key_the_logsumexp_is_that_of_nothing(dropout: float, grad: bool) -> None:
    q, none = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0, 8)
    with torch.set_grad_enabled(grad):
        context, lse = attention(q, none, none, dropout_p=dropout)
    assert torch.equal(context, torch.zeros_like(q))
    assert (lse == float("-inf")).all()


@given(spread=st.sampled_from([0.1, 10.0, 1000.0]), seed=st.integers(0, 99))
def test_the_logsumexp_of_dropped_weights_is_that_of_their_scores(spread: float, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = torch.randn(1, 2, 5, 8) * spread, torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    mask = torch.rand(5, 7) > 0.3
    lse = attention(q, k, v, mask, dropout_p=0.3)[1]
    rounding = 1e-6 * (1 + (q @ k.mT).abs().max().item())  # of the scores themselves
    torch.testing.assert_close(lse, dense_lse(q, k, mask), rtol=0, atol=rounding)


@pytest.mark.parametrize("grad", [True, False])
def test_under_autocast_the_logsumexp_is_that_of_the_cast_scores(grad: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16) * 3 for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        context, lse = attention(q, k, v)
        assert torch.equal(context, F.scaled_dot_product_attention(q, k, v))
    cast_q, cast_k = q.bfloat16().double(), k.bfloat16().double()
    expected = (cast_q @ cast_k.mT / 4).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=1e-4)
