"""Models whose parameters are offloaded: done right, or refused with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import surgery
from tests.support.models import build

IDS = torch.arange(14).reshape(2, 7) + 3


def spliced() -> Any:
    torch.manual_seed(0)
    model = build("llama").eval()
    surgery.splice(model, surgery.method("lora", rank=2))
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.normal_()
    return model


def fresh() -> Any:
    torch.manual_seed(0)
    return build("llama").eval()


@pytest.mark.filterwarnings("ignore")
def test_an_offloaded_model_is_saved_and_otherwise_refused(tmp_path: Path) -> None:
    model = spliced()
    expected = model(IDS).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    # Its hooks let each inserted module run by itself: products of other shapes round otherwise.
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    surgery.save(model, tmp_path)
    assert torch.equal(surgery.load(fresh(), tmp_path)(IDS).logits, expected)
    other = accelerate.cpu_offload(fresh(), execution_device="cpu")
    with pytest.raises(surgery.SpliceError, match="remove_hook_from_submodules"):
        surgery.splice(other, surgery.method("lora"))


@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_offloaded_to_memory_are_merged_and_unmerged() -> None:
    model = spliced()
    expected, base = model(IDS).logits, fresh()(IDS).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    merged = surgery.merge(model)
    assert len(merged.folded) == 4
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert all(p.is_meta for p in model.parameters())
    surgery.unmerge(model, merged)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    merged = surgery.merge(model)
    merged.undo(model)
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_offloaded_to_disk_are_refused(tmp_path: Path) -> None:
    model = spliced()
    accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    with pytest.raises(surgery.SpliceError, match="remove_hook_from_submodules"):
        surgery.merge(model)
