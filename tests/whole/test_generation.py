"""Generation from a spliced model: every cache, beam search, padding, assistants, chunked prefill.

A fresh splice must give the tokens of the base; moved parameters must give the tokens of a forward
over the whole sequence, which knows no cache.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from tests.support.models import GENERATORS, build, inputs, perturb
from tests.support.splices import with_inducer_and_lora
from tests.zoo.build import build as zoo_model

METHODS = [surgery.method("inducer", key_rank=2, value_rank=2), surgery.method("lora", rank=2)]


GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


OPTIONS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beam search": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 3},
}


KINDS = {
    "causal": "llama",
    "fused qkv": "gpt2",
    "sliding window": "mistral",
    "sliding and full": "gemma2",
    "sinks": "gpt_oss",
    "latent": "deepseek_v3",
    "hybrid": "qwen3_next",
    "state space and attention": "jamba",
    "encoder and decoder": "bart",
    "relative bias, encoder and decoder": "t5",
}


CASES = [  # each kind by default, each option for two of them; all pairs in the slow tier
    pytest.param(
        kind,
        option,
        marks=() if option == "dynamic cache" or kind in ("causal", "hybrid") else pytest.mark.slow,
    )
    for kind in KINDS
    for option in OPTIONS
]


def base_of(kind: str) -> Any:
    model = zoo_model(KINDS[kind]).model
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # tiny models repeat one token otherwise
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def prompt(padded: bool = True) -> dict[str, Tensor]:
    ids = (torch.arange(16).reshape(2, 8) * 7) % 40 + 5
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
        ids[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("kind", "option"), CASES)
@pytest.mark.few(8)
def test_a_fresh_splice_generates_what_the_base_does(kind: str, option: str) -> None:
    model = base_of(kind)
    options = {**GREEDY, **OPTIONS[option], "pad_token_id": 0}
    expected = model.generate(**prompt(), **options)
    surgery.splice(model, METHODS, at=surgery.locate(model).attention)
    assert torch.equal(model.generate(**prompt(), **options), expected)
    perturb(model, 0.5)
    moved = model.generate(**prompt(), **options)
    assert moved.shape == expected.shape
    with surgery.disabled(model):
        assert torch.equal(model.generate(**prompt(), **options), expected)


@pytest.mark.parametrize("option", ["static cache", "chunked prefill", "no cache"])
@pytest.mark.parametrize("kind", ["causal", "fused qkv", "sliding window", "sliding and full"])
@pytest.mark.few(6)
def test_moved_parameters_generate_the_same_by_every_cache(kind: str, option: str) -> None:
    model = base_of(kind)
    surgery.splice(model, METHODS, at=surgery.locate(model).attention)
    perturb(model, 0.3)
    options = {**GREEDY, "pad_token_id": 0}
    expected = model.generate(**prompt(), **options)
    assert torch.equal(model.generate(**prompt(), **options, **OPTIONS[option]), expected)


def test_left_padding_does_not_change_what_follows() -> None:
    model = base_of("causal")
    surgery.splice(model, METHODS, at=surgery.locate(model).attention)
    perturb(model, 0.3)
    together = model.generate(**prompt(), **GREEDY, pad_token_id=0)
    given = prompt()
    alone = model.generate(input_ids=given["input_ids"][:1, 3:], **GREEDY, pad_token_id=0)
    assert torch.equal(together[0, 3:], alone[0])


def test_an_assistant_drafts_for_a_spliced_model() -> None:
    model = base_of("causal")
    assistant = copy.deepcopy(model)
    surgery.splice(model, METHODS, at=surgery.locate(model).attention)
    perturb(model, 0.3)
    given = {k: v[1:] for k, v in prompt().items()}  # one sequence, as assistants want it
    expected = model.generate(**given, **GREEDY, pad_token_id=0)
    drafted = model.generate(**given, **GREEDY, pad_token_id=0, assistant_model=assistant)
    assert torch.equal(drafted, expected)


def test_a_spliced_model_drafts_for_its_base() -> None:
    model = base_of("causal")
    given = {k: v[1:] for k, v in prompt().items()}
    expected = model.generate(**given, **GREEDY, pad_token_id=0)
    assistant = copy.deepcopy(model)
    surgery.splice(assistant, METHODS, at=surgery.locate(assistant).attention)
    perturb(assistant, 0.3)
    drafted = model.generate(**given, **GREEDY, pad_token_id=0, assistant_model=assistant)
    assert torch.equal(drafted, expected)


IMPLEMENTATIONS = ("sdpa", "eager")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.few(2)
def test_greedy_generation_is_the_same_with_and_without_cache(
    name: str, implementation: str
) -> None:
    base = build(name)
    base.set_attn_implementation(implementation)
    model = with_inducer_and_lora(name, implementation)
    ids = inputs(name)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for options in ({}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}):
        case = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}
        assert torch.equal(model.generate(ids, **case), base.generate(ids, **case)), options


@pytest.mark.parametrize("name", GENERATORS)
def test_generation_with_moved_parameters_does_not_depend_on_the_cache(name: str) -> None:
    model = with_inducer_and_lora(name)
    perturb(model)
    ids = inputs(name)["input_ids"]
    case = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **case), model.generate(ids, use_cache=False, **case))
