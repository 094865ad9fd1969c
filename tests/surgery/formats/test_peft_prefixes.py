"""PEFT's prefixes where tokens are placed by distance, or a decoder reads an encoder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tr

import surgery
from tests.support.models import IDS, VOCABULARY
from tests.support.peft_cases import bart, base, move, scores
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


def bloom() -> Any:
    torch.manual_seed(0)
    config = tr.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **IDS)
    return tr.BloomForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("make", "task"), [(lambda: base("t5"), "SEQ_2_SEQ_LM"), (bloom, "CAUSAL_LM")]
)
def test_tokens_placed_by_distance_are_refused_by_name(
    make: Callable[[], Any], task: str, tmp_path: Path
) -> None:
    with_prefix(make(), task).save_pretrained(tmp_path)
    model = make()
    with pytest.raises(surgery.StoreError, match="places tokens by their distances"):
        surgery.load(model, tmp_path)
    assert untouched(model)


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
