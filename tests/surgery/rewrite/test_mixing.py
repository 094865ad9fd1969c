"""Edited attention weights mix the values, where a library's call returns both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaConfig,
)

import surgery

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50),
    "llama, grouped": LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2),
    "bert": BertConfig(**SMALL, intermediate_size=64),
}
IDS = torch.arange(8).reshape(2, 4) * 3 % 40 + 3  # as many tokens as heads


def eager(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[name]
    config._attn_implementation = "eager"
    if isinstance(config, BertConfig):
        return BertModel(config).to(dtype).eval()
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()


def first(model: Any, **given: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS, **given)[0]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_done_to_the_weights_is_done_to_the_output(name: str, dtype: torch.dtype) -> None:
    model = eager(name, dtype)
    before = first(model)
    sites = surgery.locate(model).attention
    surgery.insert(model, sites, "weights", lambda weights: weights)
    assert torch.equal(first(model), before)
    surgery.remove(model)
    surgery.insert(model, sites, "weights", lambda weights: weights.new_zeros(()) * weights)
    nothing = first(model)
    surgery.remove(model)
    surgery.ablate(model, heads=range(4), sites=sites)
    torch.testing.assert_close(nothing, first(model), rtol=0, atol=1e-6)
    assert not torch.equal(nothing, before)
    surgery.remove(model)
    assert torch.equal(first(model), before)


def test_two_edits_of_the_weights_follow_each_other() -> None:
    model = eager("gpt2")
    sites = surgery.locate(model).attention
    plain = model(input_ids=IDS, output_attentions=True)
    surgery.insert(model, sites, "weights", lambda weights: weights * 2)
    doubled = model(input_ids=IDS, output_attentions=True)
    torch.testing.assert_close(doubled.attentions[0], 2 * plain.attentions[0])
    assert not torch.allclose(doubled.logits, plain.logits, atol=1e-4)
    surgery.insert(model, sites, "weights", lambda weights: weights / 2, name="back")
    out = model(input_ids=IDS, output_attentions=True)
    torch.testing.assert_close(out.logits, plain.logits, rtol=0, atol=1e-6)


def test_what_stands_behind_sees_the_new_mix() -> None:
    model = eager("llama, grouped")
    sites = surgery.locate(model).attention
    surgery.insert(model, sites, "weights", lambda weights: 0 * weights)
    with surgery.watch(model, ports=["merged"]) as seen:
        first(model)
    assert all(not seen[site, "merged"].any() for site in sites)
