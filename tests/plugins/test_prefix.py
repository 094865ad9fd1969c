"""Tests of prefix-tuning: concatenated keys, PEFT, the zero prefix, the papers' counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from tests.support.heads_by_hand import IDS, PADDED, close, gpt2, llama, projections, roberta, turn
from tests.support.models import (
    build,
    gpt2_small,
    inputs,
    logits,
    losses_of_training,
    perturb,
    qwen_half_billion,
    watched,
)
from tests.support.peft_prefixes import beside_peft, spliced


def by_loop(
    q: Tensor, k: Tensor, v: Tensor, wo: Tensor, bo: Any, p: Any, seen: Tensor, rotary: bool
) -> Tensor:
    """Softmax over [prefix; keys], head by head and query by query: keys are concatenated."""
    (batch, heads, n, d), groups = q.shape, k.shape[1]
    rows = []
    for b in range(batch):
        for i in range(n):
            mixed = []
            for h in range(heads):
                g = h * groups // heads
                query = turn(q[b, h, i], i) if rotary else q[b, h, i]
                visible = [j for j in range(k.shape[2]) if seen[b, i, j]]
                own = [turn(k[b, g, j], j) if rotary else k[b, g, j] for j in visible]
                keys = torch.stack([*p.keys[g], *own])
                values = torch.stack([*p.values[g], *(v[b, g, j] for j in visible)])
                mixed.append((keys @ query / math.sqrt(d)).softmax(0) @ values)
            rows.append(torch.cat(mixed) @ wo + bo)
    return torch.stack(rows).view(batch, n, -1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", PADDED)
@pytest.mark.parametrize("make", [gpt2, roberta, llama])
def test_a_prefix_is_keys_and_values_in_front(
    make: Callable[..., Any], padded: str, implementation: str
) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if (make, implementation) == (llama, "eager") else torch.float64
    model = make(attn_implementation=implementation, initializer_range=0.3).to(dtype).eval()
    spliced(model)
    attn = model.get_submodule(surgery.summary(model).reports[0].sites[0].path)
    met = watched(attn)
    real = torch.tensor([PADDED["no"], PADDED[padded]]).bool()
    model(input_ids=IDS, attention_mask=real.long())
    seen = real[:, None, :].expand(2, 5, 5)
    if make is not roberta:
        seen = seen & torch.ones(5, 5).tril().bool()
    prefix = attn.get_submodule("prefix_merged")
    expected = by_loop(*projections(attn, met["x"]), prefix, seen, rotary=make is llama)
    if make is roberta:
        expected = attn.output.LayerNorm(expected + met["x"])
    atol = 1e-5 if make is llama else 1e-9  # Llama's rotary angles are float32
    close(met["y"][real], expected[real], atol)
    parameters = [prefix.keys, prefix.values, *projections(attn, met["x"])[3:4]]
    parameters = [p for p in parameters if p.requires_grad and p.is_leaf]
    ours = torch.autograd.grad(met["y"][real].sin().sum(), parameters)
    theirs = torch.autograd.grad(expected[real].sin().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, atol * 10)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_decoding_with_a_cache_equals_the_whole_forward(make: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = spliced(make(initializer_range=0.3).double().eval())
    whole = model(input_ids=IDS).logits
    first = model(input_ids=IDS[:, :3], use_cache=True)
    second = model(input_ids=IDS[:, 3:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, second.logits], 1), whole, 1e-6)
    assert second.past_key_values.get_seq_length() == 5  # the prefix is not in it


def test_a_zero_prefix_takes_its_share_of_the_softmax() -> None:
    """(1 - g) f, g = P / (P + sum_j exp S_ij): the outputs move as predicted, no more."""
    torch.manual_seed(0)
    model = gpt2(initializer_range=0.3).double().eval()
    attn = model.transformer.h[0].attn
    met: dict[str, Any] = {}
    attn.register_forward_hook(lambda m, args, y: met.update(x=args[0].detach(), y=y[0]))
    spliced(model, length=4, std=0.0)
    model(input_ids=IDS)
    q, k, v, wo, bo = projections(attn, met["x"])
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(
        torch.ones(5, 5).triu(1).bool(), -math.inf
    )
    g = 4 / (4 + scores.exp().sum(-1, keepdim=True))
    f = (1 - g) * (scores.softmax(-1) @ v)
    close(met["y"], f.transpose(1, 2).flatten(2) @ wo + bo, 1e-9)


def test_it_equals_peft_with_the_same_tensors() -> None:
    model, theirs = beside_peft()
    real = torch.ones(2, 5, dtype=torch.long)
    positions = torch.arange(3, 8).expand(2, 5)  # PEFT counts from P on
    ours = model(input_ids=IDS, attention_mask=real, position_ids=positions).logits
    close(ours, theirs(input_ids=IDS, attention_mask=real).logits, 5e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta", "vit", "plain"])
def test_a_gate_starts_at_the_base_and_opens(name: str) -> None:
    model = build(name)
    base = logits(model, inputs(name))
    method = surgery.method("prefix", length=3, gate=True, std=0.5)
    assert method.start == "gated"
    surgery.splice(model, method, example_inputs=inputs(name))
    assert torch.equal(logits(model, inputs(name)), base)
    perturb(model, 0.5)
    assert not torch.equal(logits(model, inputs(name)), base)


@pytest.mark.parametrize(
    ("options", "base", "count"),
    [
        ({"length": 108}, gpt2_small, 1_990_656),
        ({"length": 10}, gpt2_small, 184_320),
        pytest.param({"length": 20}, qwen_half_billion, 122_880, marks=pytest.mark.slow),
        ({"length": 20, "gate": True}, gpt2_small, 20 * 18_432 + 144),
    ],
)
@pytest.mark.few(1)
def test_parameter_counts_are_those_of_the_papers(options: Any, base: Any, count: int) -> None:
    with torch.device("meta"):
        model = base()
    surgery.splice(model, surgery.method("prefix", **options))
    assert surgery.summary(model).inserted == count


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"length": 0}, "length=0 is not possible. It must be an integer >= 1"),
        ({"gate": "zero"}, "gate='zero' .* True or False"),
        ({"std": -1.0}, "std=-1.0 .* a number >= 0"),
    ],
)
def test_bad_options_are_named_with_what_they_must_be(chosen: Any, message: str) -> None:
    with pytest.raises(surgery.MethodError, match=message):
        surgery.method("prefix", **chosen)


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = build("gpt2")
    ids = inputs("gpt2")["input_ids"]
    with torch.no_grad():
        model.transformer.wte.weight.normal_(0, 0.5)
    surgery.splice(model, surgery.method("prefix", length=8))
    surgery.freeze_base(model)
    losses = losses_of_training(model, ids, 0.1)
    assert losses[-1] < losses[0] / 1.5
