"""Virtual keys that lead the KV cache: outputs are those without, and no key is ever stale."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.rewrite import leading

MODELS = ["gpt2", "llama"]
METHODS = ["prefix", "prompt"]
IDS = torch.arange(8 * 7).view(8, 7) % 60 + 3
MASK = torch.ones_like(IDS)
for row in range(8):
    MASK[row, : row // 2] = 0  # padding on the left


def tuned(kind: str, method: str, **options: Any) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
        model: nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=64, **sizes))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    surgery.splice(model.eval(), surgery.method(method, length=3, **options))
    return model


def change(model: nn.Module, by: float, hidden: bool = False) -> None:
    """Change what is spliced in; ``hidden`` leaves version counters as they are."""
    for name, x in model.named_parameters():
        if "prefix" in name or "prompt" in name:
            with torch.no_grad():
                (x.data if hidden else x).add_(torch.full_like(x, by).cumsum(-1).sin())


@contextmanager
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no keys lead the cache inside the block, and no prompt be remembered."""
    with monkeypatch.context() as patch:
        patch.setattr(leading, "_front", lambda *_: None)
        patch.setattr(surgery.Remembered, "get", lambda *_: None)
        yield


def generated(model: Any, rows: int = 8, **options: Any) -> Any:
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 6}
    outputs = {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(
            IDS[-rows:], attention_mask=MASK[-rows:], **settings, **outputs, **options
        )


def leads(cache: Any) -> bool:
    return hasattr(cache.layers[0].keys, "_surgery_led")


def require_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_generate_gives_what_it_gives_without(
    kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tuned(kind, method)
    change(model, 1.0)
    for options in ({}, {"rows": 1}, {"num_beams": 3}, {"rows": 1, "prompt_lookup_num_tokens": 2},
                    {"cache_implementation": "static"}):  # fmt: skip
        found = generated(model, **options)
        with as_before(monkeypatch):
            expected = generated(model, **options)
        require_same(found, expected)
        assert not leads(expected.past_key_values)
        if options in ({}, {"rows": 1}):
            assert leads(found.past_key_values)
            lengths = [cache.past_key_values.get_seq_length() for cache in (found, expected)]
            assert lengths[0] == lengths[1]
            pairs = zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True)
            assert all(torch.allclose(a.keys, b.keys, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_write_between_two_generations_is_noticed(
    kind: str, method: str, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tuned(kind, method)
    before = generated(model)
    change(model, 1.0, hidden)
    found = generated(model)
    with as_before(monkeypatch):
        require_same(found, generated(model))
    assert not torch.allclose(found.logits[-1], before.logits[-1], atol=1e-4)


def next_logits(model: Any, cache: Any) -> Tensor:
    """Return the logits of one more token, and leave the cache as it is."""
    with torch.no_grad():
        ids = IDS[:, :1]
        out: Tensor = model(input_ids=ids, past_key_values=copy.deepcopy(cache)).logits
    return out


@pytest.mark.parametrize("kind", MODELS)
def test_a_cache_goes_on_with_the_keys_of_now(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(kind, "prefix")
    surgery.splice(model, surgery.method("prefix", length=2), name="other")
    surgery.use(model, "default")
    with torch.no_grad():
        cache = model(input_ids=IDS).past_key_values
        model(input_ids=IDS[:, :1], past_key_values=cache)
    assert leads(cache)

    def check(expect_change_from: Tensor | None = None) -> Tensor:
        found = next_logits(model, cache)
        with as_before(monkeypatch):
            assert torch.allclose(found, next_logits(model, cache), atol=1e-5)
        if expect_change_from is not None:
            assert not torch.allclose(found, expect_change_from, atol=1e-5)
        return found

    logits = check()
    change(model, 1.0)
    logits = check(logits)
    change(model, 2.0, hidden=True)
    model.eval()
    logits = check(logits)
    change(model, 3.0, hidden=True)
    surgery.use(model, "other")
    logits = check(logits)
    surgery.use(model, "default")
    logits = check(logits)
    with surgery.disabled(model):
        check(logits)
    for x in model.parameters():
        x.data = x.data + 0.01
    check(logits)


def test_a_training_step_is_noticed_by_a_remembered_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned("gpt2", "prompt")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = generated(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for x in model.parameters():  # as an optimizer of old does it
        if x.grad is not None:
            x.data.add_(x.grad, alpha=-1.0)
    found = generated(model)
    with as_before(monkeypatch):
        require_same(found, generated(model))
    assert not torch.allclose(found.logits[0], before.logits[0], atol=1e-4)
    optimizer.step()
    found = generated(model)
    with as_before(monkeypatch):
        require_same(found, generated(model))


def test_a_prompt_runs_once_for_many_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = tuned("gpt2", "prompt"), 0
    (alone,) = {type(m) for m in model.modules() if type(m).__name__ == "Alone"}
    run = alone.alone

    def counted(*given: Any) -> Any:
        nonlocal runs
        runs += 1
        return run(*given)

    monkeypatch.setattr(alone, "alone", counted)
    for _ in range(3):
        generated(model)
    assert runs <= 1
    model.transformer.h[0].attn.c_attn.register_forward_hook(lambda *_: None)
    for _ in range(2):
        generated(model)
    assert runs >= 2


def test_a_prompt_runs_again_after_another_attention_was_chosen() -> None:
    model = tuned("llama", "prompt")
    generated(model)
    (prompt,) = (m for m in model.modules() if type(m).__name__ == "Prompt")
    assert prompt.remembered.get(model.model) is not None
    model.set_attn_implementation("eager")
    assert prompt.remembered.get(model.model) is None
    model.set_attn_implementation("sdpa")
    assert prompt.remembered.get(model.model) is not None
    assert copy.deepcopy(prompt).remembered.get(model.model) is None


@pytest.mark.parametrize("method", [{"method": "prefix", "gate": True}, {"method": "norga"}])
def test_what_is_no_plain_key_stays_as_it_was(method: dict[str, Any]) -> None:
    assert not leads(generated(tuned("llama", **method)).past_key_values)


def test_a_later_method_that_reads_the_lse_keeps_keys_out_of_the_cache() -> None:
    model = tuned("llama", "prefix")
    surgery.splice(model, surgery.method("inducer"), name="inducer")
    assert not leads(generated(model).past_key_values)
    with surgery.disabled(model, "inducer"):
        assert leads(generated(model).past_key_values)
