"""PEFT's prefix of T5 and its kin, which add a trained number for each distance to a score."""

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
from tests.support.models import IDS, VOCABULARY
from tests.support.peft_cases import TOKENS, move, scores
from tests.support.splices import untouched

SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "vocab_size": VOCABULARY}
DISTANCES = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
PREFIX = 5  # with the tokens of a generation it reaches past the exact buckets and the furthest
FAMILIES = {
    "t5": (tr.T5Config, tr.T5ForConditionalGeneration, 4),
    "mt5": (tr.MT5Config, tr.MT5ForConditionalGeneration, 6),  # 6 heads of 8, on a width of 32
    "umt5": (tr.UMT5Config, tr.UMT5ForConditionalGeneration, 4),  # a table in each layer
    "longt5": (tr.LongT5Config, tr.LongT5ForConditionalGeneration, 4),
    "switch": (tr.SwitchTransformersConfig, tr.SwitchTransformersForConditionalGeneration, 4),
}


def family(name: str, attention: str = "") -> Any:
    """A tiny random model whose tables of distances are far from zero."""
    make_config, make, heads = FAMILIES[name]
    torch.manual_seed(0)
    switch = {"num_experts": 2, "num_decoder_layers": 2}
    more: dict[str, Any] = switch if name == "switch" else {}
    config = make_config(
        num_heads=heads, decoder_start_token_id=0, **more, **SIZES, **DISTANCES, **IDS
    )
    if attention:
        config._attn_implementation = attention
    model = make(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "relative_attention_bias" in path:
                parameter.normal_()
    return model


def with_prefix(name: str) -> Any:
    """A PeftModel with a prefix of noise."""
    torch.manual_seed(1)
    heads = FAMILIES[name][2]
    sizes = {"num_virtual_tokens": PREFIX, "token_dim": 8 * heads, "num_attention_heads": heads}
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        theirs = peft.get_peft_model(family(name), config).eval()
    move(theirs)
    return theirs


def generated(model: Any, **options: Any) -> Any:
    mask = torch.ones_like(TOKENS)
    mask[1, -3:] = 0
    given = {"input_ids": TOKENS, "attention_mask": mask, "do_sample": False, "min_new_tokens": 12}
    given |= {"max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(**{**given, **options})


def padded(model: Any) -> Tensor:
    """The logits of a batch in which tokens of the decoder are padding, in front or behind."""
    mask, source = torch.ones(2, 6, dtype=torch.long), torch.ones_like(TOKENS)
    mask[0, :2] = mask[1, 4:] = source[1, -3:] = 0
    with torch.no_grad():
        found: Tensor = model(
            input_ids=TOKENS, attention_mask=source, decoder_input_ids=TOKENS[:, :6],
            decoder_attention_mask=mask,
        ).logits  # fmt: skip
    return found[mask.bool()]


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_equal_pefts_both_ways(name: str, tmp_path: Path) -> None:
    theirs = with_prefix(name)
    expected = scores(theirs, "t5")
    assert not torch.allclose(scores(family(name), "t5"), expected, atol=1e-2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(family(name), tmp_path / "theirs")
    torch.testing.assert_close(scores(ours, "t5"), expected, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(padded(ours), padded(theirs), rtol=1e-5, atol=5e-6)

    surgery.save(ours, tmp_path / "ours", format="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        again = peft.PeftModel.from_pretrained(family(name), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(scores(again, "t5"), expected, rtol=1e-5, atol=5e-6)
    surgery.save(ours, tmp_path / "own")
    own = surgery.load(family(name), tmp_path / "own")
    assert torch.equal(scores(own, "t5"), scores(ours, "t5"))
    in_hand = surgery.from_peft(theirs)
    torch.testing.assert_close(scores(in_hand, "t5"), expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_equals_pefts(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = with_prefix(name)
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(family(name), tmp_path)
    plain, expected = generated(family(name), **options), generated(theirs, **options)
    kinds = [{}, {"use_cache": False}, *([{"cache_implementation": "static"}] * (name == "t5"))]
    for kind in kinds:
        found = generated(ours, **options, **kind)
        assert torch.equal(found.sequences, expected.sequences)
        for first, second in zip(expected.logits, found.logits, strict=True):
            torch.testing.assert_close(second, first, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(plain.logits[0], expected.logits[0], atol=1e-2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_module_with_the_table_is_found_whatever_computes_the_attention(
    attention: str, tmp_path: Path
) -> None:
    theirs = with_prefix("t5")
    theirs.save_pretrained(tmp_path)
    model = family("t5", attention)
    owners = {s.path: s.distances for s in surgery.locate(model).attention}
    for side in ("encoder", "decoder"):
        first = f"{side}.block.0.layer.0.SelfAttention"
        assert owners[first] == owners[f"{side}.block.1.layer.0.SelfAttention"] == first
    assert {o for path, o in owners.items() if "EncDec" in path} == {""}
    ours = surgery.load(model, tmp_path)
    torch.testing.assert_close(scores(ours, "t5"), scores(theirs, "t5"), rtol=1e-5, atol=5e-6)


def test_a_table_that_is_not_what_the_model_adds_is_refused(tmp_path: Path) -> None:
    with_prefix("t5").save_pretrained(tmp_path)
    model = family("t5")
    first = model.decoder.block[0].layer[0].SelfAttention
    kind: Any = type(first)

    class Scaled(kind):  # type: ignore[misc]
        """An attention that adds half of what its ``compute_bias`` gives to others."""

        half = False

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.half = True
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.half = False

        def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().compute_bias(*args, **kwargs) * (0.5 if self.half else 1)

    first.__class__ = Scaled
    with pytest.raises(surgery.StoreError, match="places tokens neither by numbers nor"):
        surgery.load(model, tmp_path)
    assert untouched(model)


def test_a_shifted_prefix_trains_and_goes_without_a_trace() -> None:
    model = family("t5")
    before, table = scores(model, "t5"), copy.deepcopy(model.state_dict())
    layers = surgery.locate(model).where(lambda s: s.causal and not s.cross)
    report = surgery.splice(model, surgery.method("prefix", length=3, shift=True), at=layers)
    surgery.freeze_base(model)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = [p for i in report.inserted for p in model.get_submodule(i.path).parameters()]
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in trained)
    assert sum(p.requires_grad for p in model.parameters()) == len(trained) == 4
    surgery.remove(model, report.name)
    assert untouched(model)
    assert torch.equal(scores(model, "t5"), before)
    assert all(torch.equal(x, table[name]) for name, x in model.state_dict().items())


def test_gradients_equal_pefts(tmp_path: Path) -> None:
    theirs = with_prefix("t5")
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(family("t5"), tmp_path)
    surgery.freeze_base(ours)
    found = []
    for model in (theirs, ours):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    [table], gradients = found
    dealt = table.reshape(PREFIX, 2, 2, 4, 8)[:, 0]  # both layers have the place 0
    keys, values = (sum(gradients[i::2]) for i in range(2))
    torch.testing.assert_close(keys.transpose(0, 1), dealt[:, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values.transpose(0, 1), dealt[:, 1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same(tmp_path: Path) -> None:
    with_prefix("t5").save_pretrained(tmp_path)
    ours = surgery.load(family("t5"), tmp_path)
    expected = scores(ours, "t5")
    compiled = torch.compile(ours, backend="eager")
    torch.testing.assert_close(scores(compiled, "t5"), expected, rtol=1e-5, atol=5e-6)
