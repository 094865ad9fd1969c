"""Edited attention weights mix the values, where a library's call returns both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaConfig,
)

import surgery
from tests.support.models import PlainBlock

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


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_done_to_the_scores_is_done_before_the_softmax(name: str) -> None:
    model = eager(name)
    before = first(model)
    sites = surgery.locate(model).attention
    with surgery.watch(model, ports=["scores", "weights"]) as plain:
        assert torch.equal(first(model), before)
    for site in sites:
        mixed = torch.softmax(plain[site, "scores"].float(), -1)
        torch.testing.assert_close(plain[site, "weights"], mixed, rtol=0, atol=1e-6)
    surgery.insert(model, sites[:1], "scores", lambda scores: scores.clamp(min=-1e4) * 0.5)
    with surgery.watch(model, ports=["weights"]) as halved:
        after = first(model)
    site = sites[0]
    mixed = torch.softmax(plain[site, "scores"].clamp(min=-1e4) * 0.5, -1)
    torch.testing.assert_close(halved[site, "weights"], mixed, rtol=0, atol=1e-6)
    assert not torch.equal(after, before)
    surgery.remove(model)
    assert torch.equal(first(model), before)


class Bias(nn.Module):
    """Adds a learned number to the scores of each head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(heads))

    def forward(self, scores: Tensor) -> Tensor:
        far = torch.arange(scores.shape[-1], device=scores.device) - scores.shape[-1] + 1
        return (self.slope.view(-1, 1, 1) * far.to(scores.dtype)).expand_as(scores)


@dataclass(frozen=True)
class Distance(surgery.Method):
    """A learned ALiBi."""

    name = "distance"

    def splice(self, site: surgery.OpenSite) -> None:
        site.port("scores").add(Bias(site.heads), "slope", reads=("scores",))


def test_a_method_learns_at_the_scores_and_virtual_tokens_count_what_it_leaves() -> None:
    model = eager("llama, grouped")
    before = first(model)
    surgery.splice(model, Distance())
    assert torch.equal(first(model), before)
    surgery.freeze_base(model)
    model.train()
    first(model).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for _, p in surgery.spliced_parameters(model))
    model.eval()
    with torch.no_grad():
        for _, slope in surgery.spliced_parameters(model):
            slope.fill_(0.3)
    biased = first(model)
    surgery.splice(model, surgery.method("prefix", length=2, std=0.5), name="prefix")
    seen = first(model)
    with surgery.disabled(model, "prefix"):
        torch.testing.assert_close(first(model), biased, rtol=0, atol=1e-6)
    assert not torch.allclose(seen, biased, atol=1e-4)
    with surgery.watch(model, ports=["scores"]) as scores, surgery.watch(model, ["lse"]) as lse:
        first(model)
    for site in surgery.locate(model).attention:
        total = torch.logsumexp(scores[site, "scores"].float(), -1)
        assert bool((lse[site, "lse"] >= total - 1e-4).all())


def test_scores_cannot_be_edited_behind_a_method_that_has_read_the_lse() -> None:
    model = eager("gpt2")
    surgery.splice(model, surgery.method("prefix", length=2))
    with pytest.raises(surgery.PortError, match="Splice this method in first"):
        surgery.splice(model, Distance(), name="distance")


def test_an_attention_that_computes_its_softmax_in_sight_has_scores() -> None:
    torch.manual_seed(0)
    model, x = PlainBlock(16, 2, prenorm=True, fused=False).eval(), torch.randn(2, 5, 16)
    before = model(x)
    surgery.splice(model, Distance(), at=surgery.locate(model, x).attention)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ports", [("scores",), ("weights",), ("scores", "weights")])
@pytest.mark.parametrize("name", CONFIGS)
def test_under_dropout_of_the_attention_the_same_bits_are_dropped(
    name: str, ports: tuple[str, ...], dtype: torch.dtype
) -> None:
    model = eager(name, dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    model.train()

    def run() -> Tensor:
        torch.manual_seed(5)
        return first(model)

    before = run()
    torch.manual_seed(6)
    assert not torch.equal(first(model), before)
    sites = surgery.locate(model).attention
    with surgery.watch(model, ports) as seen:
        assert torch.equal(run(), before)
    if "weights" in ports:
        assert bool((seen[sites[0], "weights"] == 0)[..., -1, :].any()), "some are dropped"
    for port in ports:
        surgery.insert(model, sites, port, lambda x: x * 1.0)
    assert torch.equal(run(), before)
    surgery.remove(model)
    assert torch.equal(run(), before)


def test_scores_are_edited_before_the_weights_that_come_from_them() -> None:
    model = eager("gpt2")
    sites = surgery.locate(model).attention
    surgery.insert(model, sites, "weights", lambda x: 2 * x)
    with pytest.raises(surgery.PortError, match="Edit 'scores' first"):
        surgery.insert(model, sites, "scores", lambda x: 2 * x)
