"""What a call tells of its tokens, from its arguments alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgery.interop.call_facts import call_facts


def test_an_additive_mask_of_keys_hides_what_it_lowers() -> None:
    low = -float("inf")
    for mask in ([[0.0, 0.0, 0.0, low]], [[1.0, 1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0, -1e9]]):
        given = {"x": torch.ones(1, 4).long(), "src_key_padding_mask": torch.tensor(mask)}
        facts = call_facts(given, "x")
        assert facts is not None
        assert facts.padding is not None
        assert facts.padding.tolist() == [[True, True, True, False]]


def test_what_a_decoder_reads_of_an_encoder_is_not_its_own() -> None:
    other = torch.tensor([[False, False, True, True, True]])
    given = {"tgt": torch.ones(1, 3).long(), "memory_key_padding_mask": other}
    facts = call_facts(given, "tgt")
    assert facts is not None
    assert facts.padding is not None
    assert facts.padding.tolist() == [[True] * 3]
    assert facts.cached.item() == 0
    embedded = {"encoder_hidden_states": torch.ones(1, 7, 4), "inputs_embeds": torch.ones(1, 3, 4)}
    facts = call_facts(embedded, "")
    assert facts is not None
    assert facts.positions is not None
    assert facts.positions.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("length", [5, torch.tensor(5)])
def test_a_mask_of_the_new_tokens_alone_goes_on_behind_the_cache(length: Any) -> None:
    class Cache:
        def get_seq_length(self) -> Any:
            return length

    new = torch.ones(1, 3).long()
    facts = call_facts({"input_ids": new, "attention_mask": new, "cache": Cache()}, "input_ids")
    assert facts is not None
    assert facts.positions is not None
    assert facts.positions.tolist() == [[5, 6, 7]]


def test_a_mask_of_a_window_alone_tells_nothing_of_the_tokens() -> None:
    mask = {"sliding_attention": torch.ones(1, 1, 1, 10).bool()}
    facts = call_facts({"input_ids": torch.ones(1, 1).long(), "attention_mask": mask}, "input_ids")
    assert facts is not None
    assert (facts.positions, facts.padding) == (None, None)
