"""Tests of inducer-tuning against its equations and a golden case."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import surgery
from surgery.attention.sdpa import attention, dense_lse
from surgery_plugins.inducer import Inducer
from tests.support.golden_inducer import K, Q, V, golden
from tests.support.heads_by_hand import (
    IDS,
    PADDED,
    close,
    fill,
    gpt2,
    llama,
    projections,
    roberta,
    turn,
)
from tests.support.models import watched

GATE = [
    [0.7455290353, 0.4008952591, 0.4230600099],
    [0.5853088722, 0.6110071924, 0.2819012887],
]
GATE_WITHOUT_KEY_MLP = [
    [0.49893767, 0.4657025155, 0.3340385601],
    [0.5002875545, 0.4584867062, 0.3498888145],
]
BASE = [
    [0.6734674399, 0.693848395, 0.3879016083, -0.1004813659, -0.5416063837, -0.7280054564],
    [0.1933824273, 1.0414742709, 1.3997444913, 1.0996930059, 0.2824387167, -0.6676509143],
    [0.769224549, 0.7964635325, 0.4491132716, -0.1094619786, -0.6165555498, -0.833673412],
]
TUNED = [
    [1.7063006744, 1.7179101812, 0.9215596866, -0.3082147283, -1.3930309405, -1.8226829347],
    [1.6824130658, 2.745426156, 2.5172224265, 1.1051296572, -0.826722858, -2.3697546952],
    [1.723050012, 1.7037133032, 0.8830936067, -0.3528588118, -1.4228562175, -1.8236621114],
]


def test_golden_gate() -> None:
    close(golden().gate(Q, dense_lse(Q, K, is_causal=True))[0], GATE)


def test_golden_gate_where_the_key_is_the_query() -> None:
    close(golden(key_rank=0).gate(Q, dense_lse(Q, K, is_causal=True))[0], GATE_WITHOUT_KEY_MLP)


def test_golden_base_and_tuned_output() -> None:
    context, lse = attention(Q, K, V, is_causal=True)
    base = context.transpose(1, 2).flatten(2) @ fill((8, 6), 0.4) + fill((6,), 0.5)
    close(base[0], BASE)
    close((base + golden()(Q, lse))[0], TUNED)


def by_loop(
    q: Tensor, k: Tensor, v: Tensor, wo: Tensor, bo: Tensor | float, p: Inducer, seen: Tensor,
    rotary: bool,
) -> Tensor:  # fmt: skip
    """Softmax over [virtual key; keys] of [virtual value; values], head by head and query by query.

    As in eq. 9, a head's values are complete ones, V Wo^h; the virtual value is f Wo^h + MLP_v^h
    (eqs 6 and 11) with its shared b2 added once per token. seen (B, n, m) says what is visible.
    """
    (batch, heads, n, d), groups = q.shape, k.shape[1]
    rows = []
    for b in range(batch):
        for i in range(n):
            y = bo + p.value_b2
            for h in range(heads):
                query, g = q[b, h, i], h * groups // heads
                pair = (lambda x, at: turn(x, at)) if rotary else (lambda x, at: x)
                visible = [j for j in range(k.shape[2]) if seen[b, i, j]]
                keys = [pair(k[b, g, j], j) for j in visible]
                values = [v[b, g, j] @ wo[h * d : (h + 1) * d] for j in visible]
                scores = torch.stack([pair(query, i) @ key / math.sqrt(d) for key in keys])
                f = sum(w * x for w, x in zip(scores.softmax(0), values, strict=True))
                hidden = torch.tanh(query @ p.key_w1[h] + p.key_b1[h])
                virtual_key = query + hidden @ p.key_w2[h] + p.key_b2[h]
                hidden = torch.tanh(query @ p.value_w1[h] + p.value_b1[h])
                virtual_value = f + hidden @ p.value_w2[h]
                own = pair(query, i) @ pair(virtual_key, i) / math.sqrt(d)
                weights = torch.cat([own[None], scores]).softmax(0)
                y = y + sum(w * x for w, x in zip(weights, [virtual_value, *values], strict=True))
            rows.append(y)
    return torch.stack(rows).view(batch, n, -1)


def spliced(model: PreTrainedModel, std: float = 0.5) -> PreTrainedModel:
    """Spliced, with parameters that do something."""
    surgery.splice(model, surgery.method("inducer", key_rank=3, value_rank=2))
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.normal_(std=std)
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", PADDED)
@pytest.mark.parametrize("build", [gpt2, roberta, llama])
def test_spliced_attention_appends_one_virtual_key_and_value_per_query(
    build: Callable[..., PreTrainedModel], padded: str, implementation: str
) -> None:
    torch.manual_seed(0)
    # Eager Llama casts its scores to float32, where the lowest float64 is -inf: rows of NaN.
    dtype = torch.float32 if (build, implementation) == (llama, "eager") else torch.float64
    model = build(attn_implementation=implementation, initializer_range=0.3).to(dtype).eval()
    spliced(model)
    attn = model.get_submodule(surgery.summary(model).reports[0].sites[0].path)
    met = watched(attn)
    real = torch.tensor([PADDED["no"], PADDED[padded]]).bool()
    model(input_ids=IDS, attention_mask=real.long())
    x, y = met["x"], met["y"]

    seen = real[:, None, :].expand(2, 5, 5)
    if build is not roberta:
        seen = seen & torch.ones(5, 5).tril().bool()
    seen = seen | ~real[:, :, None]  # queries that are padding are not compared
    inducer = attn.get_submodule("inducer_output")
    expected = by_loop(*projections(attn, x), inducer, seen, rotary=build is llama)
    if build is roberta:
        expected = attn.output.LayerNorm(expected + x)
    atol = 1e-5 if build is llama else 1e-9  # Llama's rotary angles are float32
    close(y[real], expected[real], atol)

    weights = fill(tuple(y.shape), 0.3)[real]
    parameters = [p for n, p in attn.named_parameters() if "output.LayerNorm" not in n]
    ours = torch.autograd.grad((y[real] * weights).sum(), parameters)
    theirs = torch.autograd.grad((expected[real] * weights).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, atol)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_decoding_with_a_cache_equals_the_whole_forward(
    build: Callable[..., PreTrainedModel],
) -> None:
    torch.manual_seed(0)
    model = spliced(build(initializer_range=0.3).double().eval())
    whole = model(input_ids=IDS).logits
    first = model(input_ids=IDS[:, :3], use_cache=True)
    second = model(input_ids=IDS[:, 3:4], past_key_values=first.past_key_values)
    third = model(input_ids=IDS[:, 4:], past_key_values=second.past_key_values)
    parts = torch.cat([first.logits, second.logits, third.logits], 1)
    close(parts, whole, 1e-6)


def test_a_row_does_not_depend_on_how_far_it_is_padded() -> None:
    torch.manual_seed(0)
    model = spliced(roberta(initializer_range=0.3).double().eval())
    short = model(input_ids=IDS).last_hidden_state
    ids = torch.cat([IDS, torch.ones(2, 4, dtype=torch.long)], 1)
    long = model(input_ids=ids, attention_mask=(ids != 1).long()).last_hidden_state
    close(long[:, :5], short, 1e-9)
