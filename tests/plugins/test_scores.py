"""Virtual tokens are scored as the model scores its own: softcap, stretched rotation, window."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import surgery

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.3}
YARN["original_max_position_embeddings"] = 16
PART = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 4.0}
PART |= {"short_factor": [1.0, 1.0], "long_factor": [1.0, 1.0], "attention_factor": 1.3}
PART["original_max_position_embeddings"] = 64
IDS = torch.arange(9).unsqueeze(0) * 7 % 50 + 3


def model(kind: str) -> Any:
    torch.manual_seed(0)
    made: Any = {
        "plain": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "yarn": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dict(YARN))),
        "part": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, rope_parameters=dict(PART))),
        "softcap": lambda: Gemma2ForCausalLM(
            Gemma2Config(
                **SIZES,
                head_dim=8,
                attn_logit_softcapping=1.0,
                query_pre_attn_scalar=8,
                attn_implementation="eager",
            )  # the one that caps in every version
        ),
    }[kind]
    return made().eval()


def capped(scores: Tensor, kind: str) -> Tensor:
    return torch.tanh(scores) if kind == "softcap" else scores


@pytest.mark.parametrize("kind", ["plain", "yarn", "part", "softcap"])
@torch.no_grad()
def test_an_inducers_weight_is_that_of_a_further_key_which_is_its_query(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, seen, found = model(kind), {}, {}
    surgery.splice(tuned, surgery.method("inducer", key_rank=0, value_rank=1))
    inserted = tuned.model.layers[0].self_attn.inducer_output
    inserted.register_forward_hook(lambda m, given, out: found.update(gate=m.gate(*given)))
    tuned(IDS)
    code: Any = sys.modules[type(tuned).__module__]
    rotate = code.apply_rotary_pos_emb

    def spy(*args: Any, **options: Any) -> Any:
        seen["q"], seen["k"] = rotate(*args, **options)
        return seen["q"], seen["k"]

    monkeypatch.setattr(code, "apply_rotary_pos_emb", spy)
    with surgery.disabled(tuned):
        tuned(IDS)
    q, k = seen["q"], seen["k"].repeat_interleave(2, 1)  # (B, H, n, d), rotated and stretched
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    scores = capped(q @ k.mT * 8**-0.5, kind).masked_fill(hidden, float("-inf"))
    own = capped((q * q).sum(-1, keepdim=True) * 8**-0.5, kind)
    expected = torch.cat([own, scores], -1).softmax(-1)[..., 0]
    torch.testing.assert_close(found["gate"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "yarn", "softcap"])
@torch.no_grad()
def test_a_prompt_of_rows_of_the_vocabulary_is_those_tokens(kind: str) -> None:
    base, tokens = model(kind), torch.tensor([[4, 5, 6]])
    tuned = copy.deepcopy(base)
    surgery.splice(tuned, surgery.method("prompt", length=3))
    ((_, rows),) = surgery.spliced_parameters(tuned)
    rows.copy_(base.get_input_embeddings().weight[tokens[0]])
    expected = base(torch.cat([tokens, IDS], 1)).logits[:, 3:]
    torch.testing.assert_close(tuned(IDS).logits, expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_prefix_is_capped_as_the_models_own_scores_are() -> None:
    tuned, seen = model("softcap"), {}
    surgery.splice(tuned, surgery.method("prefix", length=3, std=1.0))
    inserted = tuned.model.layers[0].self_attn.prefix_merged
    inserted.register_forward_hook(lambda m, given, out: seen.update(given=given, out=out))
    tuned(IDS)
    merged, query, lse = seen["given"]
    keys, values = (x.repeat_interleave(2, 0) for x in (inserted.keys, inserted.values))
    scores = torch.tanh(query @ keys.mT * 8**-0.5)  # (B, H, n, P)
    weights = torch.cat([scores, lse.unsqueeze(-1)], -1).softmax(-1)
    heads = merged.unflatten(-1, (4, 8)).transpose(1, 2)
    expected = weights[..., :-1] @ values + weights[..., -1:] * heads
    torch.testing.assert_close(seen["out"], expected.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_a_window_hides_the_rows_of_a_prompt_that_slip_out_of_it() -> None:
    tuned = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=11)).eval()
    base = copy.deepcopy(tuned)
    surgery.splice(tuned, surgery.method("prompt", length=3))
    ((_, rows),) = surgery.spliced_parameters(tuned)
    rows.copy_(base.get_input_embeddings().weight[4:7])
    front = torch.tensor([[4, 5, 6]])
    for count in (8, IDS.shape[1]):  # with the prompt, as many tokens as the window sees, and more
        ids = IDS[:, :count]
        expected = base(torch.cat([front, ids], 1)).logits[:, 3:]
        torch.testing.assert_close(tuned(ids).logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "softcap"])
@torch.no_grad()
def test_two_prefixes_are_one_of_both(kind: str) -> None:
    double, single = model(kind).double(), model(kind).double()
    for name, length in (("a", 3), ("b", 4)):
        surgery.splice(double, surgery.method("prefix", length=length, std=1.0), name=name)
    surgery.splice(single, surgery.method("prefix", length=7), name="c")
    attention = double.model.layers[0].self_attn
    whole = single.model.layers[0].self_attn.c_prefix_merged
    for name in ("keys", "values"):
        parts = [getattr(attention.get_submodule(f"{n}_prefix_merged"), name) for n in "ab"]
        getattr(whole, name).copy_(torch.cat(parts, 1))
    gap = (double(IDS).logits - single(IDS).logits).abs().max()
    moved = (model(kind).double()(IDS).logits - single(IDS).logits).abs().max()
    assert gap < 1e-5 < moved  # rotated in float32, inside the model


@pytest.mark.parametrize("first", ["prefix", "prompt", "norga", "gated"])
@torch.no_grad()
def test_an_inducer_counts_what_stands_before_it_among_the_keys(first: str) -> None:
    options = {"gated": {"gate": True, "length": 3, "std": 1.0}, "prompt": {"length": 3}}
    before = surgery.method(
        "prefix" if first == "gated" else first, **options.get(first, {"length": 3})
    )
    tuned = model("plain")
    surgery.splice(tuned, [before, surgery.method("inducer", key_rank=0, value_rank=1)])
    for name, parameter in surgery.spliced_parameters(tuned):
        if name.endswith("gate"):
            parameter.normal_()
    attention, seen = tuned.model.layers[0].self_attn, {}
    name = "prefix" if first == "gated" else first
    attention.get_submodule(f"{name}_merged").register_forward_hook(
        lambda m, given, out: seen.update(base=given[2], total=m.total_lse(*given))
    )
    attention.inducer_output.register_forward_hook(lambda m, given, out: seen.update(lse=given[1]))
    tuned(IDS)
    assert torch.equal(seen["lse"], seen["total"])
    assert not torch.allclose(seen["lse"], seen["base"])
    with surgery.disabled(tuned):
        tuned(IDS)
