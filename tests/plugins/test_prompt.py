"""Tests of prompt-tuning: real concatenation, PEFT, generation, the papers' counts."""

from __future__ import annotations

import copy
import gc
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
import transformers as tr
from torch import Tensor

import surgery
from surgery_plugins.prompt_modules import Prompt
from tests.support.models import (
    build,
    checkpointing,
    gpt2_small,
    inputs,
    logits,
    losses_of_imitation,
    perturb,
)

IDS = torch.arange(14).reshape(2, 7) + 3
ENCODERS = ["none", "mlp", "ptuning"]


def spliced(name: str, **options: Any) -> Any:
    model = build(name)
    method = surgery.method("prompt", **{"length": 3, "hidden": 5, **options})
    surgery.splice(model, method, example_inputs=inputs(name))
    perturb(model)
    return model


def rows(model: Any) -> Tensor:
    """The rows of the prompt, from the formulas of its encoder."""
    own = {n.split("prompt.")[-1]: p for n, p in surgery.spliced_parameters(model)}
    x = own.pop("rows")
    layers = sorted({int(n.split(".")[1]) for n in own})
    for i in layers:
        x = x @ own[f"encoder.{i}.weight"].T + own[f"encoder.{i}.bias"]
        if i != layers[-1]:
            x = torch.tanh(x) if len(layers) == 2 else torch.relu(x)
    return x


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta", "bert"])
def test_it_is_rows_in_front_of_the_embeddings(name: str, encoder: str) -> None:
    model, ids = spliced(name, encoder=encoder), inputs(name)["input_ids"]
    base = build(name)
    front = rows(model).expand(2, -1, -1)
    whole = torch.cat([front, base.get_input_embeddings()(ids)], 1)
    if name == "roberta":  # its head reads the first token; its positions skip padding tokens
        hidden = base.roberta(inputs_embeds=whole)[0][:, 3:]
        expected = base.classifier(hidden)
    else:
        expected = base(inputs_embeds=whole).logits[:, 3:]
    torch.testing.assert_close(logits(model, {"input_ids": ids}), expected, rtol=0, atol=2e-6)


def keys_by_feature() -> Any:
    """Its keys are made (B, G, d, m), in one permutation."""
    config = tr.OpenAIGPTConfig(n_layer=2, n_embd=32, n_head=4, vocab_size=99)
    return tr.OpenAIGPTLMHeadModel(config)


def heads_in_the_batch() -> Any:
    """Its heads are (B H, n, d)."""
    sizes = {"num_layers": 2, "d_model": 32, "attention_heads": 4, "ffn_dim": 64}
    return tr.XGLMForCausalLM(tr.XGLMConfig(vocab_size=99, **sizes))


@pytest.mark.parametrize("make", [keys_by_feature, heads_in_the_batch])
@pytest.mark.parametrize("length", [3, 8])  # 8: as wide as a head
def test_keys_may_lie_in_another_way(make: Any, length: int) -> None:
    torch.manual_seed(0)
    base, ids = make().eval(), torch.arange(14).reshape(2, 7) + 3
    model = copy.deepcopy(base)
    surgery.splice(model, surgery.method("prompt", length=length, init="normal", std=0.5))
    front = rows(model).expand(2, -1, -1)
    embedded = base.get_input_embeddings()(ids)
    expected = base(inputs_embeds=torch.cat([front, embedded], 1)).logits[:, length:]
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("example", [None, {"input_ids": IDS}], ids=["default", "without a mask"])
def test_positions_are_told_from_the_mask_beside_them(example: Any) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "ffn_dim": 64}
    base = tr.OPTForCausalLM(tr.OPTConfig(num_attention_heads=4, vocab_size=60, **sizes)).eval()
    model = copy.deepcopy(base)
    surgery.splice(model, surgery.method("prompt", length=3), example_inputs=example)
    embedded = base.get_input_embeddings()(IDS)
    whole = torch.cat([rows(model).expand(2, -1, -1), embedded], 1)
    expected = base(inputs_embeds=whole).logits[:, 3:]
    for given in ({}, {"attention_mask": torch.ones_like(IDS)}):
        found = model(input_ids=IDS, **given).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_equals_peft_with_the_same_tensors(name: str) -> None:
    model, case = build(name), inputs(name)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with warnings.catch_warnings():  # PEFT's own
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    surgery.splice(model, surgery.method("prompt", length=4, init="normal", std=0.5))
    with torch.no_grad():
        own = next(p for _, p in surgery.spliced_parameters(model))
        theirs.prompt_encoder["default"].embedding.weight.copy_(own)
    torch.testing.assert_close(logits(model, case), theirs(**case).logits[:, 4:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_with_and_without_a_cache_is_the_same(name: str) -> None:
    model, case = spliced(name, length=5), inputs(name)
    case["attention_mask"] = torch.ones_like(case["input_ids"])
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**case, **settings)
    assert torch.equal(cached, model.generate(**case, **settings, use_cache=False))
    assert torch.equal(model.generate(**case, **settings, num_beams=3)[:, :7], case["input_ids"])
    with surgery.disabled(model):
        assert not torch.equal(cached, model.generate(**case, **settings))


@pytest.mark.parametrize("tokens", [1, 4])
@torch.no_grad()
def test_each_text_starts_from_the_weights_of_now(tokens: int) -> None:
    model, given = spliced("gpt2"), {"input_ids": torch.arange(tokens).unsqueeze(0)}
    first = logits(model, given)
    assert torch.equal(logits(model, given), first)
    perturb(model, 0.5, seed=9)
    second = logits(model, given)
    assert not torch.equal(second, first)
    with torch.enable_grad():  # always runs the prompt anew
        torch.testing.assert_close(model(**given).logits, second, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_text_that_goes_on_needs_one_run_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = spliced("gpt2", length=3), []
    prompt = next(m for m in model.modules() if isinstance(m, Prompt))
    forward = prompt.forward
    monkeypatch.setattr(prompt, "forward", lambda: runs.append(1) or forward())
    ids = torch.arange(6).unsqueeze(0)
    whole = model(input_ids=ids).logits
    prompt.remembered.forget()
    cache = model(input_ids=ids[:, :2], use_cache=True).past_key_values
    prompt.remembered.forget()  # from here on the cache alone knows
    chunk = model(input_ids=ids[:, 2:5], past_key_values=cache).logits
    last = model(input_ids=ids[:, 5:], past_key_values=cache).logits
    assert len(runs) == 2  # for the whole text, and for the first of its three parts
    torch.testing.assert_close(torch.cat([chunk, last], 1), whole[:, 2:], rtol=0, atol=1e-6)


def without_dropout(name: str) -> Any:
    model = spliced(name)
    surgery.freeze_base(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model.train()


def gradients(model: Any, backwards: int = 1) -> list[Tensor]:
    model.zero_grad()
    loss = logits(model, {"input_ids": IDS}).square().sum()
    for left in reversed(range(backwards)):
        loss.backward(retain_graph=left > 0)
    return [p.grad.clone() for _, p in surgery.spliced_parameters(model)]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    model = without_dropout(name)
    once, twice = gradients(model), gradients(model, backwards=2)
    if reentrant and name == "roberta":  # whose layers get frozen embeddings otherwise
        model.enable_input_require_grads()
    checkpointing(model, reentrant)
    for found, expected in ((gradients(model), once), (gradients(model, 2), twice)):
        assert all(map(torch.equal, found, expected)) or reentrant
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # sums in another order


def test_two_forwards_before_one_backward_keep_their_own_prompt() -> None:
    model = without_dropout("gpt2")
    alone = [2 * g for g in gradients(model)]
    checkpointing(model, reentrant=True)
    model.zero_grad()
    first, second = (model(IDS).logits.square().sum() for _ in range(2))
    with torch.no_grad():
        model.eval()(IDS)
    (first + second).backward()
    for (_, parameter), expected in zip(surgery.spliced_parameters(model), alone, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6)


class Token:
    """Lives as long as the node of an autograd graph that it is given to."""


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta"])
def test_no_graph_outlives_a_call(name: str) -> None:
    model, alive = without_dropout(name), []

    def mark(module: Any, given: Any, rows: Tensor) -> Tensor:
        rows, token = rows * 1, Token()
        rows.grad_fn.metadata["token"] = token
        alive.append(weakref.ref(token))
        return rows

    next(m for m in model.modules() if isinstance(m, Prompt)).register_forward_hook(mark)
    out = logits(model, inputs(name))
    gc.collect()
    assert [token() is not None for token in alive] == [True]
    del out
    gc.collect()
    assert alive[0]() is None


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
def test_threads_that_share_a_prompt_do_not_meet(name: str) -> None:
    model = spliced(name)
    texts = [torch.randint(3, 30, (2, 5 + i)) for i in range(3)]
    with torch.no_grad():
        expected = [logits(model, {"input_ids": ids}) for ids in texts]

    @torch.no_grad()
    def work(i: int) -> bool:
        runs = (logits(model, {"input_ids": texts[i]}) for _ in range(40))
        return all(torch.equal(found, expected[i]) for found in runs)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(work, range(3)))
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"length": 20}, 15_360),
        ({"length": 20, "encoder": "mlp", "hidden": 512}, 803_072),
        ({"length": 20, "encoder": "ptuning", "hidden": 768}, 1_787_136),
    ],
)
def test_parameter_counts_are_those_of_the_papers(options: Any, trained: int) -> None:
    # Where a prompt goes is seen from values, not on the meta device; width alone sets its size.
    model = gpt2_small(n_layer=2, vocab_size=100, bos_token_id=0, eos_token_id=0)
    surgery.splice(model, surgery.method("prompt", **options))
    summary = surgery.summary(model)
    assert (summary.inserted, summary.stored) == (trained, 15_360)


@pytest.mark.parametrize("name", ["vit"])
def test_a_model_without_tokens_is_refused(name: str) -> None:
    with pytest.raises(surgery.SiteError, match=r"needs token ids|exactly one module"):
        surgery.splice(build(name), surgery.method("prompt"), example_inputs=inputs(name))


def test_embeddings_instead_of_ids_are_an_error_that_says_so() -> None:
    model = spliced("gpt2")
    whole = model.get_input_embeddings()(inputs("gpt2")["input_ids"])
    with pytest.raises(surgery.ForwardError, match="called without 'input_ids'"):
        model(inputs_embeds=whole)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_it_learns_what_another_of_its_kind_does(name: str) -> None:
    losses = losses_of_imitation(name, surgery.method("prompt", length=4), 0.05)
    assert losses[-1] < losses[0] / 10
