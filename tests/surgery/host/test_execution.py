"""Tests of how a host runs: checkpointing, attention implementations, changed attributes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import surgery
from tests.support.models import NAMES, build, checkpointing, inputs, logits, perturb
from tests.support.splices import with_inducer_and_lora


@pytest.mark.parametrize("name", [n for n in NAMES if n != "plain"])
def test_attentions_and_hidden_states_come_out_as_before(name: str) -> None:
    base = build(name)
    base.set_attn_implementation("eager")
    model = with_inducer_and_lora(name, "eager")
    case = inputs(name) | {"output_attentions": True, "output_hidden_states": True}
    a, b = base(**case), model(**case)
    assert len(b.attentions) == 2
    assert len(b.hidden_states) == 3
    for x, y in zip(a.attentions + a.hidden_states, b.attentions + b.hidden_states, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "plain"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.few(5)
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    model = with_inducer_and_lora(name)
    perturb(model)
    surgery.freeze_base(model, fresh=False)
    model.train()
    if reentrant:
        model.enable_input_require_grads() if name != "vit" else _inputs_need_grad(model)
    plain = _gradients(model, name)
    checkpointing(model, reentrant)
    checkpointed = _gradients(model, name)
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, rtol=1e-4, atol=1e-6)


def _inputs_need_grad(model: nn.Module) -> None:
    next(model.children()).embeddings.register_forward_hook(lambda m, a, o: o.requires_grad_())


def _gradients(model: Any, name: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    logits(model, inputs(name)).pow(2).sum().backward()
    return {k: p.grad.clone() for k, p in surgery.spliced_parameters(model) if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_switching_the_attention_implementation_after_the_splice(name: str) -> None:
    if name == "plain":
        return
    base, model = build(name), with_inducer_and_lora(name)
    for implementation in ("eager", "sdpa", "eager"):
        base.set_attn_implementation(implementation)
        model.set_attn_implementation(implementation)
        assert torch.equal(logits(model, inputs(name)), logits(base, inputs(name)))


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_attribute_is_seen(name: str) -> None:
    base, model = build(name).train(), with_inducer_and_lora(name).train()
    for each in (base, model):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
    torch.manual_seed(2)
    expected = logits(base, inputs(name))
    torch.manual_seed(2)
    assert torch.equal(logits(model, inputs(name)), expected)
