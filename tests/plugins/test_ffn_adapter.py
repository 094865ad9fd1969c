"""Tests of bottleneck adapters against hooks written from the equations, and the papers' counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from tests.support.models import (
    build,
    gpt2_small,
    inputs,
    logits,
    losses_of_training,
    perturb,
    roberta_base,
)
from tests.zoo.build import build as zoo_model

PLACEMENTS = ("houlsby", "attention", "pfeiffer", "parallel")
# Where a model's own code computes what the equations call a, m and u.
LAYERS: dict[str, Callable[[Any], list[Any]]] = {
    "gpt2": lambda m: list(m.transformer.h),
    "llama": lambda m: list(m.model.layers),
    "roberta": lambda m: list(m.roberta.encoder.layer),
}
ATTENTION_OUT = {
    "gpt2": "attn.c_proj",
    "llama": "self_attn.o_proj",
    "roberta": "attention.output.dense",
}
FFN_OUT = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj", "roberta": "output.dense"}
FFN_IN = {"gpt2": "mlp.c_fc", "llama": "mlp.up_proj", "roberta": "intermediate.dense"}


def adapter(**options: Any) -> surgery.Method:
    return surgery.method("ffn_adapter", **{"rank": 3, **options})


def by_loop(a: nn.Module, h: Tensor) -> Tensor:
    """s A(h), token by token, from the equation."""
    named: dict[str, Any] = dict(a.named_parameters())
    scale = named.get("scale", a.scale)
    out = torch.empty_like(h)
    for b in range(h.shape[0]):
        for n in range(h.shape[1]):
            x = h[b, n]
            if "norm.weight" in named:
                x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
                x = x * named["norm.weight"] + named["norm.bias"]
            hidden = named["down.weight"] @ x + named["down.bias"]
            hidden = torch.where(hidden > 0, hidden, torch.zeros_like(hidden))
            out[b, n] = scale * (named["up.weight"] @ hidden + named["up.bias"])
    return out


def hooked(name: str, model: Any, spliced: Any, placement: str) -> None:
    """Make ``model`` compute the equations with the adapters of ``spliced``."""
    behind = {"houlsby": (ATTENTION_OUT, FFN_OUT), "attention": (ATTENTION_OUT,)}
    for layer, twin in zip(LAYERS[name](model), LAYERS[name](spliced), strict=True):
        found = [m for n, m in twin.named_modules() if n.endswith("ffn_adapter_output")]
        if placement == "parallel":
            read: list[Tensor] = []
            layer.get_submodule(FFN_IN[name]).register_forward_pre_hook(
                lambda m, args, read=read: read.append(args[0])
            )
            layer.get_submodule(FFN_OUT[name]).register_forward_hook(
                lambda m, args, y, read=read, a=found[0]: y + by_loop(a, read.pop())
            )
            continue
        for place, a in zip(behind.get(placement, (FFN_OUT,)), found, strict=True):
            layer.get_submodule(place[name]).register_forward_hook(
                lambda m, args, y, a=a: y + by_loop(a, y)
            )


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=settings().max_examples // 2)  # for each of twelve cases
@given(scale=st.sampled_from([1.0, 4.0, -0.5, "learned"]), norm=st.booleans())
@pytest.mark.few(4)
def test_a_splice_is_what_the_equations_say(
    name: str, placement: str, scale: Any, norm: bool
) -> None:
    model = build(name).double()
    surgery.splice(model, adapter(placement=placement, scale=scale, layer_norm=norm))
    perturb(model, 0.5)
    reference = build(name).double()
    hooked(name, reference, model, placement)
    expected = logits(reference, inputs(name))
    assert torch.allclose(logits(model, inputs(name)), expected, rtol=0, atol=1e-9)
    assert not torch.allclose(logits(build(name).double(), inputs(name)), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "base", "count"),
    [
        ({"rank": 108, "placement": "attention", "layer_norm": True}, gpt2_small, 2_019_600),
        pytest.param(
            {"rank": 108, "placement": "attention"}, gpt2_small, 2_001_168, marks=pytest.mark.slow
        ),
        ({"rank": 64, "placement": "houlsby"}, gpt2_small, 2_379_264),
        pytest.param(
            {"rank": 64, "placement": "pfeiffer"}, gpt2_small, 1_189_632, marks=pytest.mark.slow
        ),
        ({"rank": 64, "placement": "parallel"}, gpt2_small, 1_189_632),
        pytest.param({"rank": 42}, gpt2_small, 12 * 65_322, marks=pytest.mark.slow),
        ({"rank": 16, "placement": "houlsby"}, roberta_base, 608_640),
        pytest.param(
            {"rank": 64, "scale": "learned"}, gpt2_small, 1_189_632 + 12, marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.few(1)
def test_parameter_counts_are_those_of_the_papers(options: Any, base: Any, count: int) -> None:
    with torch.device("meta"):
        model = base()
    surgery.splice(model, adapter(**options))
    assert surgery.summary(model).inserted == count


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_normal_init_declares_no_exact_start_and_stays_near(placement: str) -> None:
    model = build("gpt2")
    base = logits(model, inputs("gpt2"))
    method = adapter(placement=placement, init="normal")
    assert method.start == "none"
    surgery.splice(model, method)
    moved = (logits(model, inputs("gpt2")) - base).abs().max()
    assert 0 < moved < 0.3 * base.abs().max()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"rank": 0}, "rank=0 is not possible. It must be an integer >= 1"),
        ({"placement": "behind"}, "placement='behind' .* one of houlsby, attention, pfeiffer"),
        ({"scale": 0}, "scale=0 .* a number other than 0, or 'learned'"),
        ({"scale": "big"}, "scale='big'"),
        ({"dropout": 1.0}, r"dropout=1.0 .* in \[0, 1\)"),
        ({"init": "ones"}, "init='ones' .* 'zero' or 'normal'"),
    ],
)
def test_bad_options_are_named_with_what_they_must_be(chosen: Any, message: str) -> None:
    with pytest.raises(surgery.MethodError, match=message):
        adapter(**chosen)


def test_experts_take_a_parallel_adapter() -> None:
    tiny = zoo_model("mixtral")
    sites = surgery.locate(tiny.model, tiny.inputs).ffn
    assert {site.description for site in sites} == {"expert FFN"}
    base = logits(tiny.model, tiny.inputs)
    surgery.splice(tiny.model, adapter(scale=2.0), at=sites)
    assert torch.equal(logits(tiny.model, tiny.inputs), base)
    perturb(tiny.model, 0.5)
    assert not torch.equal(logits(tiny.model, tiny.inputs), base)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_learns(placement: str) -> None:
    torch.manual_seed(0)
    model = build("gpt2")
    ids = inputs("gpt2")["input_ids"]
    with torch.no_grad():
        model.transformer.wte.weight.normal_(0, 0.5)  # logits of some size, as trained models have
    surgery.splice(model, adapter(placement=placement, rank=8, dropout=0.1))
    surgery.freeze_base(model)
    losses = losses_of_training(model, ids, 0.03)
    assert losses[-1] < losses[0] / 4
