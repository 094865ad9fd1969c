"""Attention to virtual keys, against a softmax that is written out."""

from __future__ import annotations

import math

import torch

import surgery
from surgery_recipes.diagnosis.virtual_mass import BINS, virtual_mass
from tests.support.models import build, inputs, perturb


def test_the_mass_of_a_prefix_is_its_share_of_a_dense_softmax() -> None:
    model = build("gpt2").eval()
    surgery.splice(model, surgery.method("prefix", length=3))
    perturb(model, 0.5)
    batch = {"input_ids": torch.randint(3, 50, (2, 6)), "attention_mask": torch.ones(2, 6).long()}
    batch["attention_mask"][1, 4:] = 0
    (first, *_) = virtual_mass(model, [batch])
    attention = model.transformer.h[0].attn
    seen: list[torch.Tensor] = []
    handle = attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    handle.remove()
    width, heads = model.config.n_embd, model.config.n_head
    with surgery.disabled(model):
        q, k, _ = attention.c_attn(seen[0]).split(width, -1)
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
    keys, _ = attention.prefix_merged.leading_keys()
    scale = 1 / math.sqrt(width // heads)
    real = (q @ k.mT * scale).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
    virtual = q @ keys.expand(2, -1, -1, -1).mT * scale
    shares = torch.cat([virtual, real], -1).softmax(-1)[..., :3].sum(-1)  # (B, H, n)
    mask = batch["attention_mask"].bool()
    expected = shares.transpose(0, 1)[:, mask].mean(1)
    torch.testing.assert_close(torch.tensor(first.by_head), expected, rtol=1e-4, atol=1e-6)
    assert first.site == "transformer.h.0.attn"


def test_the_mass_of_an_inducer_is_its_gate_and_hooks_are_gone() -> None:
    model = build("bert").eval()
    surgery.splice(model, surgery.method("inducer"))
    batch = inputs("bert")
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    found = virtual_mass(model, [batch, batch])
    assert len(found) == model.config.num_hidden_layers
    for mass in found:
        assert len(mass.by_head) == model.config.num_attention_heads
        assert all(0 < value < 1 for value in mass.by_head)
        assert len(mass.by_position) == BINS
        assert not model.get_submodule(mass.module)._forward_pre_hooks


def test_a_method_without_virtual_keys_has_no_mass() -> None:
    model = build("gpt2").eval()
    surgery.splice(model, surgery.method("lora"))
    batch = {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 4).long()}
    assert virtual_mass(model, [batch]) == []
