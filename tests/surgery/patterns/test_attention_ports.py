"""Tests of the ports of an attention: which part of a projection they are, and in which dtype."""

from __future__ import annotations

import torch
from transformers import CohereConfig, CohereForCausalLM

import surgery


def test_queries_that_are_rotated_in_float32_reach_an_inducer_in_their_own_dtype() -> None:
    config = CohereConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    model = CohereForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.arange(8).unsqueeze(0)
    expected = model(ids).logits
    surgery.splice(model, surgery.method("inducer", key_rank=2, value_rank=2))
    assert torch.equal(model(ids).logits, expected)
