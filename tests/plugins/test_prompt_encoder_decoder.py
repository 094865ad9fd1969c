"""Prompts in front of the tokens of an encoder, a decoder or both, against real concatenation."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tr
from torch import Tensor

import surgery
from tests.support.models import checkpointing

P = 3
SIZES = {"vocab_size": 60, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
SEQUENCES = ["encoder", "decoder", "both"]


def t5() -> Any:
    config = tr.T5Config(
        d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **SIZES
    )
    return tr.T5ForConditionalGeneration(config)


def bart() -> Any:
    names = ("encoder_layers", "decoder_layers", "encoder_attention_heads")
    layers = dict.fromkeys(names, 2)
    more = {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    more |= {"bos_token_id": 1, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    return tr.BartForConditionalGeneration(
        tr.BartConfig(scale_embedding=True, dropout=0.0, **layers, **more, **SIZES)
    )


MODELS = {"t5": t5, "bart": bart}


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # tiny models repeat one token otherwise
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(tokens: int = 5) -> dict[str, Tensor]:
    """One sequence padded on the left, one on the right."""
    ids, mask = torch.arange(14).reshape(2, 7) * 5 % 50 + 5, torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = mask[1, -3:] = 0
    decoder = torch.arange(2 * tokens).reshape(2, tokens) * 7 % 50 + 4
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder}


def spliced(base: Any, sequence: str, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """A copy with a prompt, and its rows by the sequence in front of which they stand."""
    model = copy.deepcopy(base)
    method = surgery.method("prompt", length=P, sequence=sequence, init="normal", std=0.5)
    surgery.splice(model, method, **options)
    parameters = surgery.spliced_parameters(model)
    side = {
        n: "decoder" if "decoder" in n.split(".prompt")[0] else "encoder" for n, _ in parameters
    }
    return model, {side[n]: p for n, p in surgery.spliced_parameters(model)}


def concatenated(base: Any, rows: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
    """The logits of the base on embeddings with rows in front, and masks with ones."""
    call: dict[str, Any] = dict(given)
    if "encoder" in rows:
        embedded = base.get_encoder().embed_tokens(call.pop("input_ids"))
        call["inputs_embeds"] = torch.cat([rows["encoder"].expand(2, -1, -1), embedded], 1)
        if "attention_mask" in call:
            front = torch.ones(2, P, dtype=torch.long)
            call["attention_mask"] = torch.cat([front, call["attention_mask"]], 1)
    tokens = call["decoder_input_ids"].shape[1]
    if "decoder" in rows:
        embedded = base.get_decoder().embed_tokens(call.pop("decoder_input_ids"))
        call["decoder_inputs_embeds"] = torch.cat([rows["decoder"].expand(2, -1, -1), embedded], 1)
        if "decoder_attention_mask" in call:
            front = torch.ones(2, P, dtype=torch.long)
            call["decoder_attention_mask"] = torch.cat([front, call["decoder_attention_mask"]], 1)
    return base(**call).logits[:, -tokens:]


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_is_rows_in_front_of_the_embeddings(name: str, sequence: str) -> None:
    base = build(name)
    model, rows = spliced(base, sequence)
    assert set(rows) == ({"encoder", "decoder"} if sequence == "both" else {sequence})
    for tokens in (5, 7):  # 7: as long as the encoder's sequence
        given = inputs(tokens)
        mask = torch.ones_like(given["decoder_input_ids"])
        mask[0, -2:] = 0
        for more in ({}, {"decoder_attention_mask": mask}):
            expected = concatenated(base, rows, {**given, **more})
            found = model(**given, **more).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
            assert (found - base(**given, **more).logits).abs().max() > 0.01
    given.pop("attention_mask")
    for more in ({}, {"decoder_attention_mask": mask}):
        expected = concatenated(base, rows, {**given, **more})
        torch.testing.assert_close(model(**given, **more).logits, expected, rtol=0, atol=5e-6)
    surgery.remove(model)
    assert torch.equal(model(**given).logits, base(**given).logits)


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.few(4)
def test_caches_and_beams_generate_what_the_whole_forward_does(name: str, sequence: str) -> None:
    model, _ = spliced(build(name), sequence)
    given = {k: v for k, v in inputs().items() if not k.startswith("decoder")}
    for beams in ({}, {"num_beams": 3}):
        cached = model.generate(**given, **GREEDY, **beams)
        assert torch.equal(cached, model.generate(**given, **GREEDY, **beams, use_cache=False))
        with surgery.disabled(model):
            assert beams or not torch.equal(cached, model.generate(**given, **GREEDY))


@torch.no_grad()
def test_a_text_goes_on_from_its_own_cache_only() -> None:
    model, _ = spliced(build("t5"), "decoder")
    given = inputs()
    whole, ids = model(**given).logits, given.pop("decoder_input_ids")
    cache = model(**given, decoder_input_ids=ids[:, :2]).past_key_values
    assert cache.get_seq_length() == 2 + P
    copied = copy.deepcopy(cache)
    for each in (cache, copied):
        rest = model(**given, decoder_input_ids=ids[:, 2:], past_key_values=each).logits
        torch.testing.assert_close(rest, whole[:, 2:], rtol=0, atol=1e-5)
    with surgery.disabled(model):
        other = model(**given, decoder_input_ids=ids[:, :2]).past_key_values
    with pytest.raises(surgery.ForwardError, match="does not begin with this prompt"):
        model(**given, decoder_input_ids=ids[:, 2:], past_key_values=other)
    with pytest.raises(surgery.ForwardError, match="no static cache"):
        model.generate(**given, **GREEDY, cache_implementation="static")


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_peft_with_the_same_tensors(name: str) -> None:
    base, given = build(name), inputs()
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=1
    )
    with warnings.catch_warnings():  # PEFT's own
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    model, rows = spliced(base, "encoder")
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(rows["encoder"])
        if name == "bart":  # PEFT embeds by the shared table, without the model's scale
            theirs.word_embeddings.embed_scale = base.get_encoder().embed_tokens.embed_scale
        labels = given["decoder_input_ids"]
        given = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
        expected = theirs(**given, labels=labels)
        found = model(**given, labels=labels)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=5e-6)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_concatenation(name: str, sequence: str) -> None:
    base = build(name).double()
    model, rows = spliced(base, sequence)
    surgery.freeze_base(model)
    given = inputs()

    def gradients(logits: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(logits.square().sum(), list(rows.values())))

    expected = gradients(concatenated(base, rows, given))
    found = gradients(model(**given).logits)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.modules():
        if isinstance(getattr(layer, "dropout", None), float):
            layer.dropout = 0.0
    checkpointing(model)
    repeated = gradients(model(**given, use_cache=False).logits)
    for a, b, c in zip(found, repeated, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(b, c, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sequence", SEQUENCES)
@torch.no_grad()
def test_a_half_precision_base_follows_concatenation(sequence: str) -> None:
    base = build("bart").to(torch.bfloat16)
    model, rows = spliced(base, sequence)
    assert all(p.dtype == torch.float32 for p in rows.values())
    half = {k: p.to(torch.bfloat16) for k, p in rows.items()}
    found, expected = model(**inputs()).logits, concatenated(base, half, inputs())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("sequence", SEQUENCES)
@torch.no_grad()
def test_a_loaded_prompt_gives_the_saved_bits(tmp_path: Path, sequence: str) -> None:
    base = build("t5")
    model, _ = spliced(base, sequence)
    surgery.save(model, tmp_path)
    surgery.load(base, tmp_path)
    assert torch.equal(model(**inputs()).logits, base(**inputs()).logits)


def test_a_selection_of_the_decoder_puts_the_rows_there() -> None:
    base = build("bart")
    sites = surgery.locate(base)
    decoder = sites.where(lambda site: site.path.startswith("model.decoder"))
    _, rows = spliced(base, "encoder", at=decoder)
    assert set(rows) == {"decoder"}
    encoder = sites.where(lambda site: site.path.startswith("model.encoder"))
    with pytest.raises(surgery.SiteError, match=r"a decoder reads what 'model\.encoder' makes"):
        spliced(base, "encoder", at=encoder)


@pytest.mark.parametrize("sequence", SEQUENCES)
@torch.no_grad()
def test_a_mask_that_may_be_of_either_sequence_is_an_error(sequence: str) -> None:
    base = build("t5")
    given = inputs(7)
    mask = given.pop("attention_mask")
    model, rows = spliced(base, sequence, example_inputs=given)
    with pytest.raises(surgery.ForwardError, match="may be the mask of either sequence"):
        model(**given, attention_mask=mask)
    expected = concatenated(base, rows, {**inputs(5), "attention_mask": mask})
    found = model(**{**inputs(5), "attention_mask": mask}).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


def test_a_decoder_beside_an_encoder_without_tokens_takes_a_prompt() -> None:
    torch.manual_seed(0)
    config = tr.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=60,
        num_mel_bins=8, max_source_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    base = tr.WhisperForConditionalGeneration(config).eval()
    ids = inputs()["decoder_input_ids"]
    given = {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": ids}
    model, rows = spliced(base, "encoder", example_inputs=given)
    assert set(rows) == {"decoder"}
    with torch.no_grad():
        expected = concatenated(base, rows, given)
        torch.testing.assert_close(model(**given).logits, expected, rtol=0, atol=5e-6)
