"""PEFT's prefixes where tokens are placed by distance, or a decoder reads an encoder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tr

import surgery
from tests.support.models import IDS, VOCABULARY
from tests.support.peft_cases import TOKENS, bart, base, move, scores
from tests.support.splices import untouched


def with_prefix(model: Any, task: str = "SEQ_2_SEQ_LM", **options: Any) -> Any:
    """A PeftModel with a prefix of noise."""
    torch.manual_seed(1)
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        theirs = peft.get_peft_model(model, config).eval()
    move(theirs)
    return theirs


def bloom(heads: int = 4) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8 * heads, "n_layer": 2, "n_head": heads, "initializer_range": 0.2}
    config = tr.BloomConfig(vocab_size=VOCABULARY, **sizes, **IDS)
    return tr.BloomForCausalLM(config).eval()


def mpt() -> Any:
    torch.manual_seed(0)
    config = tr.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, **IDS)
    return tr.MptForCausalLM(config).eval()


def test_tokens_placed_in_a_way_that_is_not_known_are_refused_by_name(tmp_path: Path) -> None:
    sizes = {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4}  # unread in MPT's config
    with_prefix(mpt(), "CAUSAL_LM", **sizes).save_pretrained(tmp_path)
    model = mpt()
    with pytest.raises(surgery.StoreError, match="places tokens neither by numbers nor"):
        surgery.load(model, tmp_path)
    assert untouched(model)


@pytest.mark.parametrize("heads", [4, 6])  # 6 is no power of two, which BLOOM treats otherwise
def test_bloom_equals_pefts_both_ways(heads: int, tmp_path: Path) -> None:
    theirs = with_prefix(bloom(heads), "CAUSAL_LM")
    expected = scores(theirs, "gpt2")
    assert not torch.allclose(scores(bloom(heads), "gpt2"), expected, atol=1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(bloom(heads), tmp_path / "theirs")
    torch.testing.assert_close(scores(ours, "gpt2"), expected, rtol=1e-5, atol=2e-6)

    surgery.save(ours, tmp_path / "ours", format="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        again = peft.PeftModel.from_pretrained(bloom(heads), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(scores(again, "gpt2"), expected, rtol=1e-5, atol=2e-6)
    surgery.save(ours, tmp_path / "own")
    own = surgery.load(bloom(heads), tmp_path / "own")
    assert torch.equal(scores(own, "gpt2"), scores(ours, "gpt2"))
    in_hand = surgery.from_peft(theirs)
    torch.testing.assert_close(scores(in_hand, "gpt2"), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_bloom_generates_what_pefts_does(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = with_prefix(bloom(), "CAUSAL_LM")
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(bloom(), tmp_path)
    mask = torch.ones_like(TOKENS)
    mask[1, :3] = 0
    given = {"input_ids": TOKENS, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    given |= {"return_dict_in_generate": True, "output_logits": True, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, expected, found = (m.generate(**given) for m in (bloom(), theirs, ours))
    assert torch.equal(found.sequences, expected.sequences)
    for without, first, second in zip(plain.logits, expected.logits, found.logits, strict=True):
        assert not torch.allclose(without, first, atol=1e-2)
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)


def test_slopes_are_found_where_the_model_adds_them() -> None:
    assert {site.slopes for site in surgery.locate(bloom())} == {(), (0.25, 2**-4, 2**-6, 2**-8)}
    for model in (mpt(), base("t5"), base("llama"), base("gpt2")):  # MPT counts from the last key
        assert {site.slopes for site in surgery.locate(model)} == {()}


def test_a_shift_needs_places() -> None:
    with pytest.raises(surgery.SiteError, match="shift=True: no module"):
        surgery.splice(mpt(), surgery.method("prefix", length=3, shift=True))


@pytest.mark.parametrize(
    ("layers", "encoder_layers", "options"),
    [(1, 1, {}), (2, 2, {}), (3, 3, {}), (2, 4, {}),
     (3, 3, {"prefix_projection": True, "encoder_hidden_size": 16})],
)  # fmt: skip
def test_a_decoder_behind_an_encoder_equals_pefts(
    layers: int, encoder_layers: int, options: dict[str, Any], tmp_path: Path
) -> None:
    theirs = with_prefix(bart(layers, encoder_layers), **options)
    expected = scores(theirs, "t5")
    assert not torch.allclose(scores(bart(layers, encoder_layers), "t5"), expected, atol=1e-2)
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(bart(layers, encoder_layers), tmp_path)
    torch.testing.assert_close(scores(ours, "t5"), expected, rtol=1e-5, atol=2e-6)
    in_hand = surgery.from_peft(theirs)
    torch.testing.assert_close(scores(in_hand, "t5"), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("layers", [2, 3])
def test_it_is_written_so_that_peft_reads_the_same(layers: int, tmp_path: Path) -> None:
    with_prefix(bart(layers)).save_pretrained(tmp_path / "theirs")
    ours = surgery.load(bart(layers), tmp_path / "theirs")
    expected = scores(ours, "t5")
    surgery.save(ours, tmp_path / "ours", format="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        again = peft.PeftModel.from_pretrained(bart(layers), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(scores(again, "t5"), expected, rtol=1e-5, atol=2e-6)


def test_layers_that_share_a_place_in_pefts_table_must_be_equal(tmp_path: Path) -> None:
    with_prefix(bart(2)).save_pretrained(tmp_path / "theirs")
    ours = surgery.load(bart(2), tmp_path / "theirs")
    move(ours)
    with pytest.raises(surgery.SpliceError, match="another prefix in layer 0 than in the layer"):
        surgery.save(ours, tmp_path / "ours", format="peft")
    assert not (tmp_path / "ours").exists()


def test_fewer_layers_than_the_decoder_has_are_refused(tmp_path: Path) -> None:
    with_prefix(bart(2)).save_pretrained(tmp_path)
    with pytest.raises(surgery.StoreError, match=r"a prefix for 2 of 4 layers of the decoder"):
        surgery.load(bart(4), tmp_path)
