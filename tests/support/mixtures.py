"""Tiny mixtures of experts with stacked weights, one of each layout."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tr

IDS = torch.arange(14).reshape(2, 7) + 3
SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def moe(name: str, how: str) -> Any:
    """A small model whose experts have stacked weights; with two tokens some get none."""
    torch.manual_seed(0)
    options: dict[str, Any] = {**SIZES, **HEADS, "experts_implementation": how}
    top = {"num_experts_per_tok": 2}
    if name == "mixtral":
        return tr.MixtralForCausalLM(tr.MixtralConfig(**options, **top, num_local_experts=6)).eval()
    if name == "gpt_oss":
        kinds = ["full_attention"] * 2
        options |= {"num_local_experts": 6, "head_dim": 8, "layer_types": kinds, **top}
        return tr.GptOssForCausalLM(tr.GptOssConfig(**options)).eval()
    widths = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    return tr.Qwen2MoeForCausalLM(
        tr.Qwen2MoeConfig(**options, **widths, **top, num_experts=6)
    ).eval()
