"""hotswap writes the weights of a saved adapter into a splice, and keeps every graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from tests.support.models import build, inputs, logits, perturb

GIVEN = inputs("llama")
METHODS = [surgery.method("lora", rank=2), surgery.method("prefix", length=3)]


def adapter(folder: Path, seed: int, methods: Any = METHODS, name: str = "one") -> Any:
    """Save an adapter with random values; return what its model computes."""
    model = build("llama")
    surgery.splice(model, methods, name=name)
    perturb(model, 0.3, seed)
    surgery.save(model, folder)
    return logits(model, GIVEN)


def test_weights_are_replaced_and_graphs_stay(tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)
    model = build("llama")
    surgery.load(model, tmp_path / "a", name="customer-1")
    assert torch.equal(logits(model, GIVEN), first)
    graphs = surgery.variants(model)
    surgery.hotswap(model, "customer-1", tmp_path / "b")
    assert torch.equal(logits(model, GIVEN), second)
    assert surgery.variants(model) == graphs
    surgery.hotswap(model, "customer-1", tmp_path / "a")
    assert torch.equal(logits(model, GIVEN), first)


def test_another_kind_of_adapter_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    first = adapter(tmp_path / "a", 1)
    adapter(tmp_path / "rank", 2, [surgery.method("lora", rank=3), METHODS[1]])
    adapter(tmp_path / "sites", 2, [surgery.method("lora", rank=2, ports="all"), METHODS[1]])
    model = build("llama")
    surgery.load(model, tmp_path / "a")
    surgery.freeze_base(model, keep=["lm_head"])
    surgery.save(model, tmp_path / "head")
    for other, message in {
        "rank": "methods: .*rank=3",
        "sites": "ports=",
        "head": "lm_head.weight, which all splices",
        "nowhere": "nowhere",
    }.items():
        with pytest.raises(surgery.StoreError, match=message):
            surgery.hotswap(model, "one", tmp_path / other)
    with pytest.raises(surgery.SpliceError, match="nothing named 'two'"):
        surgery.hotswap(model, "two", tmp_path / "a")
    assert torch.equal(logits(model, GIVEN), first)


def test_a_splice_that_is_partly_merged_is_refused(tmp_path: Path) -> None:
    methods = [surgery.method("lora", rank=2), surgery.method("prefix", length=3)]
    adapter(tmp_path / "a", 1, methods)
    model = build("llama")
    surgery.load(model, tmp_path / "a")
    surgery.merge(model, partial=True)
    expected = logits(model, GIVEN)
    with pytest.raises(surgery.SpliceError, match="partly merged"):
        surgery.hotswap(model, "one", tmp_path / "a")
    assert torch.equal(logits(model, GIVEN), expected)
