"""Tests of the paper's ablations, Adaptive and Gating, and of the counts of its combinations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.attention.sdpa import attention
from surgery_plugins.inducer import Fade
from tests.support.golden_inducer import K, Q, V, golden
from tests.support.heads_by_hand import (
    IDS,
    close,
    fill,
    gpt2,
    llama,
    projections,
    roberta,
    turn,
)
from tests.support.models import (
    build,
    gpt2_small,
    inputs,
    logits,
    perturb,
    qwen_half_billion,
    roberta_base,
    watched,
)

GATING = [
    [1.5698519155, 1.8412303527, 1.246649385, 0.0657497321, -1.1460730472, -1.8188797645],
    [1.801983986, 2.6477815617, 2.2482860962, 0.7913865492, -1.0377144576, -2.3787621402],
    [1.6041492192, 1.7211049863, 1.0285981854, -0.1476744144, -1.2544934297, -1.7713045829],
]


def test_golden_gating_output() -> None:
    inducer = golden()
    context, lse = attention(Q, K, V, is_causal=True)
    merged = context.transpose(1, 2).flatten(2)
    faded = merged + Fade(inducer)(merged, Q, lse)
    close((faded @ fill((8, 6), 0.4) + fill((6,), 0.5) + inducer(Q, lse))[0], GATING)


def by_loop(
    q: Tensor, k: Tensor, v: Tensor, wo: Tensor, bo: Any, p: Any, variant: str, rotary: bool
) -> Tensor:
    """Softmax over [virtual key; keys] of [virtual value; values], causal, query by query.

    Adaptive keeps values in the head: P_v = f + MLP_v. Gating has complete ones: P_v = MLP_v.
    """
    (batch, heads, n, d), groups = q.shape, k.shape[1]
    rows = []
    for b in range(batch):
        for i in range(n):
            y = bo + (p.value_b2 if variant == "gating" else 0.0)
            for h in range(heads):
                query, g, block = q[b, h, i], h * groups // heads, wo[h * d : (h + 1) * d]
                pair = (lambda x, at: turn(x, at)) if rotary else (lambda x, at: x)
                keys = [pair(k[b, g, j], j) for j in range(i + 1)]
                scores = torch.stack([pair(query, i) @ key / math.sqrt(d) for key in keys])
                values = v[b, g, : i + 1]
                hidden = torch.tanh(query @ p.value_w1[h] + p.value_b1[h])
                virtual_key = query
                if variant == "gating":
                    inner = torch.tanh(query @ p.key_w1[h] + p.key_b1[h])
                    virtual_key = query + inner @ p.key_w2[h] + p.key_b2[h]
                own = pair(query, i) @ pair(virtual_key, i) / math.sqrt(d)
                weights = torch.cat([own[None], scores]).softmax(0)
                if variant == "gating":
                    y = y + (weights[1:] @ values) @ block + weights[0] * (hidden @ p.value_w2[h])
                else:
                    f = scores.softmax(0) @ values
                    virtual = f + hidden @ p.value_w2[h] + p.value_b2[h]
                    y = y + (weights[1:] @ values + weights[0] * virtual) @ block
            rows.append(y)
    return torch.stack(rows).view(batch, n, -1)


def method(variant: str, **options: Any) -> surgery.Method:
    key_rank = 0 if variant == "adaptive" else 3
    chosen = {"key_rank": key_rank, "value_rank": 2, "variant": variant, **options}
    return surgery.method("inducer", **chosen)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", ["adaptive", "gating"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_splice_is_what_the_equations_say(
    make: Callable[..., Any], variant: str, implementation: str
) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if (make, implementation) == (llama, "eager") else torch.float64
    model = make(attn_implementation=implementation, initializer_range=0.3).to(dtype).eval()
    surgery.splice(model, method(variant))
    perturb(model, 0.5)
    attn = model.get_submodule(surgery.summary(model).reports[0].sites[0].path)
    met = watched(attn)
    whole = model(input_ids=IDS).logits
    own = attn.get_submodule("inducer_output" if variant == "gating" else "inducer_merged")
    given = projections(attn, met["x"])
    expected = by_loop(*given, own, variant, rotary=make is llama)
    close(met["y"], expected, 1e-5 if make is llama else 1e-9)
    first = model(input_ids=IDS[:, :3], use_cache=True)
    second = model(input_ids=IDS[:, 3:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, second.logits], 1), whole, 1e-5)


@pytest.mark.parametrize("make", [gpt2, llama, roberta])
def test_adaptive_starts_exact_and_gating_does_not(make: Callable[..., Any]) -> None:
    model = make().eval()
    base = model(input_ids=IDS)[0]
    assert method("adaptive").start == "exact"
    surgery.splice(model, method("adaptive"))
    assert torch.equal(model(input_ids=IDS)[0], base)
    surgery.remove(model)
    assert method("gating").start == "none"
    surgery.splice(model, method("gating"))
    assert not torch.equal(model(input_ids=IDS)[0], base)
    surgery.remove(model)
    assert torch.equal(model(input_ids=IDS)[0], base)


def test_shared_parameters_are_trained_counted_and_saved_once(tmp_path: Path) -> None:
    model, given = build("llama"), inputs("llama")
    report = surgery.splice(model, method("gating"))
    surgery.freeze_base(model)
    named = [p for _, p in surgery.spliced_parameters(model)]
    assert len({id(p) for p in named}) == len(named)
    total = sum(p.numel() for p in named)
    assert surgery.summary(model).inserted == sum(i.parameters for i in report.inserted) == total
    assert surgery.summary(model).trainable == total
    perturb(model, 0.5)
    surgery.save(model, tmp_path)
    loaded = surgery.load(build("llama"), tmp_path)
    assert torch.equal(logits(loaded, given), logits(model, given))


def lora(rank: int, bias: bool) -> surgery.Method:
    return surgery.method("lora", rank=rank, ports=("query",), bias=bias)


def beside(rank: int) -> surgery.Method:
    return surgery.method("ffn_adapter", rank=rank, placement="parallel")


def inducer(key_rank: int, value_rank: int, variant: Any = "inducer") -> surgery.Method:
    return surgery.method("inducer", key_rank=key_rank, value_rank=value_rank, variant=variant)


ROWS: list[tuple[str, Any, list[surgery.Method], int]] = [
    ("Adaptive", gpt2_small, [inducer(0, 108, "adaptive")], 2_015_424),
    ("Extension", gpt2_small, [inducer(0, 16)], 1_928_448),
    ("Gating", gpt2_small, [inducer(10, 15, "gating")], 2_003_472),
    ("Inducer", gpt2_small, [inducer(10, 15)], 2_003_472),
    ("+ LoRA", gpt2_small, [lora(24, True), inducer(5, 12)], 2_002_320),
    ("MAM inducer", gpt2_small, [lora(16, True), inducer(3, 7), beside(42)], 2_001_816),
    ("MAM adapter", gpt2_small, [surgery.method("prefix", length=6), beside(102)], 2_001_096),
    ("MAM inducer, NLU", roberta_base, [lora(4, False), inducer(2, 2), beside(12)], 599_760),
    ("MAM inducer, grouped", qwen_half_billion, [lora(16, False), inducer(3, 7), beside(42)],
     4_950_288),
]  # fmt: skip
FAST = {"Adaptive", "MAM inducer"}


@pytest.mark.parametrize(
    ("name", "base", "methods", "count"),
    [
        pytest.param(*row, id=row[0], marks=[pytest.mark.slow] * (row[0] not in FAST))
        for row in ROWS
    ],
)
@pytest.mark.few(1)
def test_parameter_counts_are_those_of_the_paper(
    name: str, base: Any, methods: list[surgery.Method], count: int
) -> None:
    with torch.device("meta"):
        model = base()
    surgery.splice(model, methods)
    assert surgery.summary(model).inserted == count


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"variant": "both"}, "variant='both' .* one of inducer, adaptive, gating"),
        ({"variant": "adaptive", "key_rank": 2}, "key_rank=2 .* 0 for variant='adaptive'"),
    ],
)
def test_bad_options_are_named_with_what_they_must_be(chosen: Any, message: str) -> None:
    with pytest.raises(surgery.MethodError, match=message):
        surgery.method("inducer", **chosen)
