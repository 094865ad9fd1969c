"""Tests of surgery.core against loops over the equations, finite differences and PyTorch's SDPA."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sink_attention
from transformers.models.llama.modeling_llama import eager_attention_forward

from surgery.attention.library_functions import with_lse
from surgery.attention.math_path import normalised
from surgery.attention.sdpa import attention, dense_lse, logsumexp

INF = float("inf")


def heads(
    n: int, m: int, h: int = 2, g: int = 2, d: int = 4, b: int = 2, dtype: Any = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query (b, h, n, d), key and value (b, g, m, d), the same at every call."""
    generator = torch.Generator().manual_seed(n + 31 * m)
    shapes = ((b, h, n, d), (b, g, m, d), (b, g, m, d))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return q, k, v


def holes(n: int, m: int, b: int = 2) -> Tensor:
    """A boolean mask (b, 1, n, m) in which every query sees key 0 and some others."""
    seen = torch.rand(b, 1, n, m, generator=torch.Generator().manual_seed(n * m)) > 0.4
    seen[..., 0] = True
    return seen


def additive(seen: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The additive form of a boolean mask."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -INF)


def masks(n: int, m: int) -> dict[str, dict[str, Any]]:
    """Options of SDPA, by what they do."""
    smooth = torch.linspace(-2, 2, n * m, dtype=torch.float64).reshape(1, 1, n, m)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": holes(n, m)},
        "additive": {"attn_mask": additive(holes(n, m)) + smooth},
        "scaled": {"scale": 0.3},
    }


MASKS = sorted(masks(1, 1))


def by_loop(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """S = scale Q K^T + M; softmax(S) V and log sum exp S, one number at a time."""
    (b, h, n, d), (g, m) = q.shape, k.shape[1:3]
    context, lse = q.new_zeros(b, h, n, v.shape[-1]), q.new_zeros(b, h, n)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(b, h, n, m)
    for x, y, i in ((x, y, i) for x in range(b) for y in range(h) for i in range(n)):
        group = y * g // h
        scores = []
        for j in range(m):
            s = float(q[x, y, i] @ k[x, group, j]) * (d**-0.5 if scale is None else scale)
            if is_causal and j > i:
                s = -INF
            elif attn_mask is not None and attn_mask.dtype == torch.bool:
                s = s if attn_mask[x, y, i, j] else -INF
            elif attn_mask is not None:
                s += float(attn_mask[x, y, i, j])
            scores.append(s)
        top = max(scores)
        if top == -INF:
            lse[x, y, i] = -INF
            continue
        total = sum(math.exp(s - top) for s in scores)
        lse[x, y, i] = top + math.log(total)
        for j, s in enumerate(scores):
            context[x, y, i] += math.exp(s - top) / total * v[x, group, j]
    return context, lse


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


@settings(max_examples=15, deadline=None)
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

    with pytest.raises(RuntimeError, match=r"linear shows neither a softmax nor an SDPA call"):
        with_lse(linear)(None, *heads(3, 3))


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
