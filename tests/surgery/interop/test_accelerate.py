"""Tests of models with accelerate's hooks: placement and weights on disk."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import surgery
from tests.support.models import build, inputs, logits
from tests.support.splices import with_three_methods


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta"])
def test_hooks_of_accelerate_before_and_after_a_splice(name: str) -> None:
    def hooked(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if not any(module.children()) or "Attention" in type(module).__name__:
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
        return model

    expected = logits(with_three_methods(build(name), name), inputs(name))
    before = with_three_methods(hooked(build(name)), name)
    assert torch.equal(logits(before, inputs(name)), expected)
    after = hooked(with_three_methods(build(name), name))
    assert torch.equal(logits(after, inputs(name)), expected)
    for model in (before, after):
        base = logits(build(name), inputs(name))
        surgery.remove(model)
        assert torch.equal(logits(model, inputs(name)), base)
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(logits(model, inputs(name)), base)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_whose_weights_lie_on_disk(name: str, tmp_path: Path) -> None:
    """``device_map`` with offloading: weights come in only while a module runs."""
    expected = logits(with_three_methods(build(name), name), inputs(name))
    model = build(name)
    accelerate.cpu_offload(model, execution_device="cpu")
    with_three_methods(model, name)
    assert torch.equal(logits(model, inputs(name)), expected)
