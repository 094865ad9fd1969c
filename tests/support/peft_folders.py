"""A folder as PEFT writes it for a tiny GPT-2, to be changed, and a base to load it into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import surgery
from tests.support.models import build
from tests.support.splices import untouched

Tensors = dict[str, Tensor]
Q = "base_model.model.transformer.h.0.attn.c_attn"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none",
    "target_modules": ["c_attn"], "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0,
}  # fmt: skip


def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        f"{Q.replace('h.0', f'h.{layer}')}.lora_{part}.weight": shape
        for layer in (0, 1)
        for part, shape in (("A", (2, 32)), ("B", (96, 2)))
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def folder(path: Path, config: Any = CONFIG, found: Tensors | None = None) -> Path:
    path.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (path / "adapter_config.json").write_text(text)
    save_file(tensors() if found is None else found, path / "adapter_model.safetensors")
    return path


BASE = build("gpt2")
BEFORE = {name: tensor.clone() for name, tensor in BASE.state_dict().items()}


def unchanged() -> None:
    """Assert that the base is what it was, and make it so for the next test."""
    state = BASE.state_dict()
    same = untouched(BASE) and state.keys() == BEFORE.keys()
    assert same
    assert all(torch.equal(tensor, BEFORE[name]) for name, tensor in state.items())


def refused(path: Path, match: str) -> None:
    with pytest.raises(surgery.StoreError, match=match):
        surgery.load(BASE, path)
    unchanged()
