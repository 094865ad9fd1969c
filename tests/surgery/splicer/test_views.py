"""A view is the model with other splices on, and shares everything with it."""

from __future__ import annotations

import pytest
import torch
import transformers as tr
from torch import nn

import surgery
from tests.support.models import PlainBlock, build, inputs, logits, perturb

GIVEN = inputs("llama")


def test_a_view_has_its_own_splices_and_no_memory_of_its_own() -> None:
    model = build("llama")
    surgery.splice(model, surgery.method("lora", rank=2), name="policy")
    surgery.splice(model, surgery.method("prompt", length=2), name="prompt")
    perturb(model)
    surgery.copy(model, "policy", "reference")
    before = logits(model, GIVEN)
    reference, base = surgery.view(model, ["reference", "prompt"]), surgery.view(model, [])
    assert isinstance(reference, tr.LlamaForCausalLM)
    assert torch.equal(logits(reference, GIVEN), before)
    assert {id(p) for p in reference.parameters()} == {id(p) for p in model.parameters()}
    for _, parameter in surgery.spliced_parameters(model, "policy"):
        nn.init.normal_(parameter)
    assert torch.equal(logits(reference, GIVEN), before)
    assert not torch.equal(logits(model, GIVEN), before)
    assert torch.equal(logits(base, GIVEN), logits(build("llama"), GIVEN))
    model.train()
    base.eval()
    assert model.model.training
    base.forward = lambda **given: None
    assert base(**GIVEN) is None
    assert model(**GIVEN) is not None
    generated = reference.generate(**GIVEN, max_new_tokens=2, do_sample=False)
    with surgery.using(model, ["reference", "prompt"]):
        assert torch.equal(model.generate(**GIVEN, max_new_tokens=2, do_sample=False), generated)


def test_a_wrong_name_is_refused() -> None:
    model = build("llama")
    with pytest.raises(surgery.SpliceError, match="nothing is spliced"):
        surgery.view(model, [])
    surgery.splice(model, surgery.method("lora", rank=2), name="policy")
    with pytest.raises(surgery.SpliceError, match="Did you mean 'policy'"):
        surgery.view(model, "polizy")


def test_a_view_has_its_splices_past_its_call_too() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 32, "num_layers": 1}
    ends = {"vocab_size": 60, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    model = tr.T5ForConditionalGeneration(tr.T5Config(**sizes, **ends)).eval()
    given = {"input_ids": GIVEN["input_ids"], "decoder_input_ids": GIVEN["input_ids"]}
    surgery.splice(model, surgery.method("lora", rank=2, ports="all"), example_inputs=given)
    perturb(model, 1.0)
    base = surgery.view(model, [])
    options = {"max_new_tokens": 2, "output_scores": True, "return_dict_in_generate": True}
    with surgery.using(model, []):
        expected = model(**given).logits
        scores = model.generate(GIVEN["input_ids"], **options).scores[0]
    assert torch.equal(base.forward(**given).logits, expected)
    assert torch.equal(base.generate(GIVEN["input_ids"], **options).scores[0], scores)
    assert not torch.equal(model(**given).logits, expected)


def test_a_model_that_is_a_host_itself_has_views() -> None:
    block, x = PlainBlock(16, 2, prenorm=True, fused=True).eval(), torch.randn(2, 5, 16)
    expected = block(x)
    surgery.splice(block, surgery.method("lora", rank=2, ports="all"), example_inputs=x)
    perturb(block)
    assert torch.equal(surgery.view(block, [])(x), expected)
    assert not torch.equal(block(x), expected)
