"""Tests of modules as they are inserted: mode, buffers, parametrised projections."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import surgery
from tests.support.custom_methods import Fed
from tests.support.models import build, inputs, logits, perturb


def test_what_is_inserted_into_a_model_in_training_trains() -> None:
    x, model = inputs("gpt2"), build("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    surgery.splice(model, surgery.method("lora", dropout=0.5))
    perturb(model)
    assert all(module.training for module in model.modules())
    assert not torch.equal(logits(model, x), logits(model, x))


def test_a_splice_brings_no_buffers_of_its_own() -> None:
    """Nothing that a graph needs may be left undefined by ``to_empty`` or a state dict."""
    model = build("gpt2")
    before = [name for name, _ in model.named_buffers()]
    surgery.splice(model, [surgery.method("ssl"), Fed()])
    assert [name for name, _ in model.named_buffers()] == before


def test_a_parametrized_projection_is_spliced_into() -> None:
    model = build("llama")
    weight_norm(model.model.layers[0].self_attn.q_proj)
    before = logits(model, inputs("llama"))
    surgery.splice(model, surgery.method("lora", rank=2))
    assert torch.equal(logits(model, inputs("llama")), before)
    perturb(model)
    assert not torch.equal(logits(model, inputs("llama")), before)
