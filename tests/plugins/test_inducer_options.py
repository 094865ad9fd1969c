"""Tests of inducer-tuning's parameter counts, options, numerical range and training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

import surgery
from surgery.attention.sdpa import attention
from surgery_plugins.inducer import Inducer
from tests.support.models import gpt2_small, qwen_half_billion, roberta_base


def options(**chosen: Any) -> surgery.Method:
    return surgery.method("inducer", **chosen)


def lora(rank: int, bias: bool) -> surgery.Method:
    return surgery.method("lora", rank=rank, ports=("query",), bias=bias)


@pytest.mark.parametrize(
    ("build", "methods", "count"),
    [
        (gpt2_small, [options(key_rank=10, value_rank=15)], 2_003_472),
        pytest.param(
            gpt2_small,
            [lora(24, True), options(key_rank=5, value_rank=12)],
            2_002_320,
            marks=pytest.mark.slow,
        ),
        (gpt2_small, [options(key_rank=0, value_rank=16)], 1_928_448),
        (roberta_base, [options(key_rank=6, value_rank=4)], 609_696),
        pytest.param(
            roberta_base,
            [lora(4, False), options(key_rank=2, value_rank=4)],
            609_120,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            qwen_half_billion,
            [options(key_rank=10, value_rank=15)],
            5_319_888,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            qwen_half_billion,
            [lora(24, False), options(key_rank=5, value_rank=12)],
            5_166_672,
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.few(1)
def test_parameter_counts_are_those_of_the_paper(
    build: Callable[[], PreTrainedModel], methods: list[surgery.Method], count: int
) -> None:
    with torch.device("meta"):
        model = build()
    surgery.splice(
        model,
        methods,
        example_inputs={"input_ids": torch.zeros(1, 5, dtype=torch.long, device="meta")},
    )
    assert surgery.summary(model).inserted == count


def test_paper_init_is_small_everywhere_and_declares_no_exact_start() -> None:
    torch.manual_seed(0)
    inducer = Inducer(12, 64, 768, 10, 15, scale=0.125, init="paper")
    entries = torch.cat([p.detach().flatten() for p in inducer.parameters()])
    assert entries.abs().max() < 0.02
    assert entries.std().item() == pytest.approx(0.00865, rel=0.01)
    assert all(p.detach().std() > 0.007 for p in inducer.parameters())
    assert options(init="paper").start == "none"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"key_rank": -1}, r"key_rank=-1 is not possible. It must be an integer >= 0"),
        ({"key_rank": 2.5}, r"key_rank=2.5 is not possible"),
        ({"value_rank": 0}, r"value_rank=0 is not possible. It must be an integer >= 1"),
        ({"dropout": 1.0}, r"dropout=1.0 is not possible. It must be in \[0, 1\)"),
        ({"init": "random"}, r"init='random' is not possible. It must be 'zero' or 'paper'"),
        ({"dropout": "much"}, r"method 'inducer': dropout='much' .* a finite number"),
        ({"key_rnak": 3}, r"no option 'key_rnak'. Did you mean 'key_rank'\?"),
    ],
)
def test_bad_options_are_named_with_what_they_must_be(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(surgery.MethodError, match=message):
        options(**chosen)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("score", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gate_and_gradients_are_finite_at_large_scores(
    dtype: torch.dtype, score: float, sign: float
) -> None:
    torch.manual_seed(0)
    inducer = Inducer(2, 64, 128, 3, 4, scale=0.125, init="paper").to(dtype)
    query = torch.randn(1, 2, 5, 64)
    query = query / query.norm(dim=-1, keepdim=True) * (8 * score) ** 0.5
    query, key = query.to(dtype).requires_grad_(), (sign * query).to(dtype).requires_grad_()
    context, lse = attention(query, key, key, is_causal=True)
    gate = inducer.gate(query, lse)
    output = inducer(query, lse)
    assert gate.dtype == torch.float32
    assert gate.isfinite().all()
    assert output.dtype == dtype
    assert output.isfinite().all()
    loss = (output.float() ** 2).sum() + context.float().sum() + gate.sum()
    gradients = torch.autograd.grad(loss, (query, key, *inducer.parameters()))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("init", ["zero", "paper"])
def test_inducer_learns(init: str) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=1, n_head=4)
    config.update({"bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.5})
    model = GPT2LMHeadModel(config).eval()
    surgery.splice(model, options(key_rank=4, value_rank=8, init=init))
    surgery.freeze_base(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = torch.arange(10).reshape(2, 5) * 7 % 27 + 3
    losses = []
    for _ in range(100):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
