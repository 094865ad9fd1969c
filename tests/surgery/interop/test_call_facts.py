"""What a call tells of its tokens, from its arguments alone."""

from __future__ import annotations

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
