"""A fused kernel is used if it gives what the equation says, and left alone if not."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from surgery.attention import kernel_trial as trial
from surgery.attention import kernels
from surgery.attention import sdpa as core
from surgery.attention.kernel_trial import Trial
from surgery.attention.sdpa import attention, dense_lse

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_kernel_of_this_machine_agrees_with_the_equation(dtype: torch.dtype) -> None:
    for width in (8, 64):
        for masked in (False, True):
            assert trial.trusted(kernels.CPU, Trial(CPU, dtype, width, masked=masked))
    assert trial.grouped_backward(kernels.CPU, CPU, dtype, 64)


def wrong_gradient(*args: Any) -> Any:
    q, k, v = kernels.CPU.backward(*args)
    return q * 1.5, k, v


def wrong_lse(*args: Any) -> Any:
    o, lse, more = kernels.CPU.forward(*args)
    return o, lse / 0.6931, more  # to the base 2, say


def missing(*args: Any) -> Any:
    raise NotImplementedError("no such operator")


@pytest.mark.parametrize(
    "broken",
    [
        dataclasses.replace(kernels.CPU, name="gradient", backward=wrong_gradient),
        dataclasses.replace(kernels.CPU, name="logsumexp", forward=wrong_lse),
    ],
)
def test_one_that_gives_something_else_is_not_trusted(broken: kernels.Kernel) -> None:
    assert not trial.trusted(broken, Trial(CPU, torch.float32, 32))


def dropping(wrong: float = 1.0) -> kernels.Kernel:
    """A kernel with dropout, in plain operations."""

    def scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        return (q @ k.mT * scale).masked_fill(hidden if causal else hidden & ~hidden, -torch.inf)

    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Any, p: float, causal: bool, scale: float
    ) -> Any:
        s = scores(q, k, causal, scale)
        kept = (torch.rand_like(s) > p) / (1 - p)
        return (s.softmax(-1) * kept) @ v, s.logsumexp(-1), kept

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, o: Tensor, lse: Tensor,
        kept: Tensor, p: float, causal: bool, scale: float,
    ) -> Any:  # fmt: skip
        weights = scores(q, k, causal, scale).softmax(-1)
        rows = (grad * o).sum(-1, keepdim=True)
        inner = weights * ((grad @ v.mT) * kept * wrong - rows) * scale
        return inner @ k, inner.mT @ q, (weights * kept).mT @ grad

    return kernels.Kernel(f"dropping {wrong}", forward, backward)


def test_a_kernel_with_dropout_is_tried_by_what_it_dropped() -> None:
    state = torch.random.get_rng_state()
    assert trial.trusted(dropping(), Trial(CPU, torch.float32, 16, dropping=True))
    assert not trial.trusted(dropping(1.2), Trial(CPU, torch.float32, 16, dropping=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_kernel_is_tried_at_the_width_that_it_would_run_at() -> None:
    def narrow(grad: Tensor, q: Tensor, *rest: Any) -> Any:
        if q.shape[-1] > 128:
            raise RuntimeError(f"at most 128, got {q.shape[-1]}")
        return kernels.CPU.backward(grad, q, *rest)

    made = dataclasses.replace(kernels.CPU, name="narrow", backward=narrow)
    assert trial.trusted(made, Trial(CPU, torch.float32, 64))
    with pytest.warns(UserWarning, match="narrow cannot be used here: at most 128, got 256"):
        assert not trial.trusted(made, Trial(CPU, torch.float32, 256))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_small_gradient_of_the_context_leaves_that_of_the_logsumexp(dtype: torch.dtype) -> None:
    q, k, v, _ = (x if x is None else x.detach().to(dtype) for x in case(4, 1, 6, 6, 8, False))
    for x in (q, k, v):
        x.requires_grad_()
    context, lse = attention(q, k, v)
    ours = torch.autograd.grad((context.float() * 1e-6).sum() + lse.sum(), [q, k])
    own = [x.detach().double().requires_grad_() for x in (q, k)]
    total = (own[0] @ own[1].mT * 8**-0.5).logsumexp(-1).sum()
    for a, b in zip(ours, torch.autograd.grad(total, own), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2)


def test_one_that_is_not_there_is_told() -> None:
    broken = dataclasses.replace(kernels.CPU, name="absent", forward=missing)
    with pytest.warns(UserWarning, match="absent cannot be used here: no such operator"):
        assert not trial.trusted(broken, Trial(CPU, torch.float32, 32))


def case(heads: int, groups: int, n: int, m: int, width: int, masked: bool) -> list[Any]:
    generator = torch.Generator().manual_seed(n * m + heads)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, requires_grad=True)

    q, k = random(2, heads, n, width), random(2, heads // groups, m, width)
    mask = torch.rand(2, 1, n, m, generator=generator) > 0.3 if masked else None
    if mask is not None:
        mask[..., 0] = True
    return [q, k, random(2, heads // groups, m, width), mask]


@given(
    groups=st.sampled_from([1, 2, 4]),
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    width=st.sampled_from([4, 8, 12]),
    masked=st.booleans(),
)
def test_grouped_heads_have_the_gradients_of_repeated_ones(
    groups: int, n: int, m: int, width: int, masked: bool
) -> None:
    q, k, v, mask = case(4, groups, n, m, width, masked)
    context, lse = attention(q, k, v, mask, enable_gqa=True)
    keys, values = (x.repeat_interleave(groups, 1).double() for x in (k, v))
    scores = q.double() @ keys.mT * width**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    expected, total = scores.softmax(-1) @ values, scores.logsumexp(-1)
    torch.testing.assert_close(context.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), total, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad((context.sin().sum() + lse.sin().sum()), [q, k, v])
    theirs = torch.autograd.grad(expected.sin().sum() + total.sin().sum(), [q, k, v])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_backward_that_knows_no_groups_is_given_repeated_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def same_heads_only(grad: Tensor, q: Tensor, k: Tensor, *rest: Any) -> Any:
        if q.shape[1] != k.shape[1]:
            raise RuntimeError("heads differ")
        return kernels.CPU.backward(grad, q, k, *rest)

    old = dataclasses.replace(kernels.CPU, name="old", backward=same_heads_only)
    q, k, v, _ = case(4, 2, 5, 5, 8, masked=False)
    found = []
    for kernel in (kernels.CPU, old):
        monkeypatch.setattr(core, "CPU", kernel)
        context, lse = attention(q, k, v, is_causal=True, enable_gqa=True)
        found.append(torch.autograd.grad(context.sum() + lse.sum(), [q, k, v]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_grouped_heads_use_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("the scores were computed densely")

    monkeypatch.setattr(core, "dense_lse", refuse)
    q, k, v, mask = case(4, 2, 6, 6, 8, masked=True)
    attention(q, k, v, mask, enable_gqa=True)
    attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("masked", [False, True])
def test_with_dropout_bits_and_draws_are_those_of_sdpa(masked: bool) -> None:
    q, k, v, mask = case(4, 1, 7, 7, 8, masked)
    found = []
    for ours in (True, False):
        torch.manual_seed(5)
        if ours:
            context, lse = attention(q, k, v, mask, 0.3, is_causal=not masked)
        else:
            context = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, mask, 0.3, is_causal=not masked
            )
        grads = torch.autograd.grad(context.sin().sum(), [q, k, v], retain_graph=True)
        found.append([context, torch.rand(1), *grads])
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True))
    for a, b in zip(found[0][2:], found[1][2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    scores = (q.double() @ k.double().mT) * 8**-0.5
    hidden = ~mask if mask is not None else torch.ones(7, 7, dtype=torch.bool).triu(1)
    total = scores.masked_fill(hidden, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse.double(), total, rtol=1e-5, atol=1e-5)
    ours_back = torch.autograd.grad(lse.sin().sum(), [q, k])
    theirs = torch.autograd.grad(total.sin().sum(), [q, k])
    for a, b in zip(ours_back, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_with_dropout_the_scores_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("a second product of queries and keys")

    monkeypatch.setattr(core, "dense_lse", refuse)
    q, k, v, mask = case(4, 1, 6, 6, 8, masked=True)
    attention(q, k, v, mask, 0.1)


@pytest.mark.parametrize("silent", ["none", "one row", "all rows"])
def test_the_gradient_of_the_logsumexp_needs_none_of_the_context(silent: str) -> None:
    """Rows whose context has no gradient, and whose logsumexp has one."""
    q, k, v, _ = case(4, 1, 6, 6, 8, masked=False)
    weight = torch.ones(2, 4, 6, 1)
    weight[0, 1, 2] = 0 if silent == "one row" else 1
    weight *= 0 if silent == "all rows" else 1
    context, lse = attention(q, k, v)
    ours = torch.autograd.grad((weight * context).sin().sum() + lse.sin().sum(), [q, k, v])
    scores = q.double() @ k.double().mT * 8**-0.5
    dense = scores.softmax(-1) @ v.double()
    total = (weight * dense).sin().sum() + scores.logsumexp(-1).sin().sum()
    for a, b in zip(ours, torch.autograd.grad(total, [q, k, v]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_of_a_gpu(dtype: torch.dtype, masked: bool) -> None:
    q, k, v, mask = (
        x.cuda().to(dtype) if x is not None and x.is_floating_point() else x
        for x in case(4, 1, 64, 64, 64, masked)
    )
    mask = None if mask is None else mask.cuda()
    context, lse = attention(q, k, v, mask, is_causal=not masked)
    expected = dense_lse(q.double(), k.double(), mask, not masked)
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=2e-2)
    assert context.dtype == dtype


ASKED = [
    pytest.param(kernel, groups, masked, id=f"{kernel.name} {groups}{' masked' * masked}")
    for kernel in kernels.CUDA.values()
    for groups in ((1, 2) if kernel.grouped else (1,))
    for masked in ((False, True) if kernel.masks else (False,))
]


@pytest.mark.parametrize(("n", "m"), [(16, 16), (7, 19)])
@pytest.mark.parametrize(("kernel", "groups", "masked"), ASKED)
def test_operators_of_a_gpu_take_what_they_are_given_and_give_its_shapes(
    kernel: kernels.Kernel, groups: int, masked: bool, n: int, m: int
) -> None:
    q, k, v = (
        torch.empty(2, heads, rows, 64, dtype=torch.bfloat16, device="meta")
        for heads, rows in ((4, n), (4 // groups, m), (4 // groups, m))
    )
    mask = torch.empty(2, 1, n, m, dtype=torch.bfloat16, device="meta") if masked else None
    options = (0.0, not masked, 0.125)
    o, lse, more = kernel.forward(q, k, v, mask, *options)

    def run(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> kernels.Grads:
        return kernel.backward(grad, q, k, v, mask, o, lse, more, *options)

    grads = kernels.with_lse_gradient(run, o, lse, q, k, v, o)
    assert (o.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:-1], torch.float32)
    assert [grad.shape for grad in grads] == [x.shape for x in (q, k, v)]
