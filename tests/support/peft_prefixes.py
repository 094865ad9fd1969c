"""Prefix-tuning beside that of PEFT with the same tensors."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch

import surgery
from tests.support.heads_by_hand import gpt2


def spliced(model: Any, **options: Any) -> Any:
    surgery.splice(model, surgery.method("prefix", **{"length": 3, "std": 0.7, **options}))
    return model


def beside_peft(**options: Any) -> tuple[Any, Any]:
    """One layer of GPT-2 with a prefix, and PEFT's with the same tensors."""
    torch.manual_seed(0)
    model = gpt2(initializer_range=0.3).eval()
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        theirs = peft.get_peft_model(gpt2(initializer_range=0.3), config).eval()
    theirs.base_model.load_state_dict(model.state_dict())
    spliced(model, **options)
    prefix = model.transformer.h[0].attn.prefix_merged
    table = theirs.prompt_encoder["default"].embedding.weight  # (P, 2 L G d), keys before values
    width = table.shape[1] // 2
    with torch.no_grad():
        table[:, :width] = prefix.keys.transpose(0, 1).flatten(1)
        table[:, width:] = prefix.values.transpose(0, 1).flatten(1)
    return model, theirs
