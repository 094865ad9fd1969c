"""hotswap writes the weights of a saved adapter into a splice, and keeps every graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

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


def lora_at(name: str, seed: int, **options: Any) -> Any:
    model = build(name)
    at = surgery.locate(model).attention
    surgery.splice(model, surgery.method("lora", rank=2, **options), at=at, name="one")
    perturb(model, 0.3, seed)
    return model


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({"alpha": 4.0}, {"alpha": 9.0}),
        ({"alpha": 4.0, "bias": True}, {"alpha": 1.0, "bias": True, "rslora": True}),
        ({}, {"alphas": {"layers.1": 3.0}}),
    ],
)
def test_another_scale_is_folded_into_b_and_keeps_every_graph(
    here: dict[str, Any], there: dict[str, Any], tmp_path: Path
) -> None:
    other = lora_at("llama", 2, **there)
    surgery.save(other, tmp_path / "other")
    model = lora_at("llama", 1, **here)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits(compiled, GIVEN)
    graphs, before = surgery.variants(model), counters["stats"]["unique_graphs"]
    surgery.hotswap(model, "one", tmp_path / "other")
    torch.testing.assert_close(logits(compiled, GIVEN), logits(other, GIVEN), rtol=1e-5, atol=1e-5)
    assert surgery.variants(model) == graphs
    assert counters["stats"]["unique_graphs"] == before
    surgery.save(model, tmp_path / "again")
    again = surgery.load(build("llama"), tmp_path / "again")
    assert torch.equal(logits(again, GIVEN), logits(model, GIVEN))


@pytest.mark.parametrize(("name", "ports"), [("llama", ("query", "value")), ("gpt2", ("all",))])
@pytest.mark.parametrize("alpha", [16.0, 5.0])
def test_a_folder_of_peft_is_taken(
    name: str, ports: tuple[str, ...], alpha: float, tmp_path: Path
) -> None:
    fused = {"fused": name == "gpt2", "ports": ports}
    other = lora_at(name, 2, alpha=alpha, **fused)
    surgery.save(other, tmp_path / "peft", format="peft")
    model, case = lora_at(name, 1, **fused), inputs(name)
    graphs = surgery.variants(model)
    surgery.hotswap(model, "one", tmp_path / "peft")
    torch.testing.assert_close(logits(model, case), logits(other, case), rtol=1e-5, atol=1e-5)
    assert surgery.variants(model) == graphs

    third = lora_at(name, 3, alpha=alpha, **fused)
    surgery.save(third, tmp_path / "third", format="peft")
    loaded = surgery.load(build(name), tmp_path / "peft", name="x")
    surgery.hotswap(loaded, "x", tmp_path / "third")
    same = surgery.load(build(name), tmp_path / "third")
    assert torch.equal(logits(loaded, case), logits(same, case))


def test_a_folder_of_peft_of_another_kind_changes_nothing(tmp_path: Path) -> None:
    for folder, method in {
        "rank": surgery.method("lora", rank=3),
        "ports": surgery.method("lora", rank=2, ports=("query", "key")),
        "bias": surgery.method("lora", rank=2, bias=True),
        "ia3": surgery.method("ia3"),
    }.items():
        model = build("llama")
        surgery.splice(model, method)
        surgery.save(model, tmp_path / folder, format="peft")
    model = lora_at("llama", 1)
    before = logits(model, GIVEN)
    for folder, message in {
        "rank": r"\(3, 32\) in the adapter, \(2, 32\) here",
        "ports": "places: .*'key'",
        "bias": "bias",
        "ia3": r"methods: .*IA3.* in the adapter, .*lora",
    }.items():
        with pytest.raises(surgery.StoreError, match=message):
            surgery.hotswap(model, "one", tmp_path / folder)
    assert torch.equal(logits(model, GIVEN), before)
