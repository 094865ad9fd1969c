"""The cost of ``locate`` grows with the number of layers, and not faster."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import surgery

LIBRARY = str(Path(surgery.__file__).parent)


def calls_of_locate(layers: int) -> int:
    """Return how many functions of the library run in one ``locate``."""
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=16, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32,
    )  # fmt: skip
    model, count = LlamaForCausalLM(config).eval(), 0

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(LIBRARY)

    ids = torch.arange(8).view(1, 8)  # a cache is copied for each layer, as a whole
    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        surgery.locate(model, {"input_ids": ids, "use_cache": False})
    finally:
        sys.setprofile(before)
    return count


def test_each_further_layer_costs_the_same() -> None:
    few, more, many = (calls_of_locate(layers) for layers in (4, 8, 16))
    assert many - more <= 2.05 * (more - few)
