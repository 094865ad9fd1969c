"""Groups of parameters for an optimizer: LoRA+'s rates, and what does not decay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import surgery
from tests.support.models import build


def spliced() -> Any:
    model = build("gpt2")
    methods = [surgery.method("lora", rank=2, bias=True), surgery.method("inducer")]
    surgery.splice(model, methods)
    surgery.freeze_base(model, keep=["transformer.ln_f"])
    surgery.train_rows(model, "transformer.wte.weight", [1])
    return model


def settings(model: Any, **options: Any) -> dict[str, tuple[float, float]]:
    """The rate and the decay of each trained parameter."""
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in surgery.parameter_groups(model, **options)
        for p in group["params"]
    }
    return {n: found[id(p)] for n, p in model.named_parameters() if p.requires_grad}


def test_each_parameter_has_its_rate_and_its_decay() -> None:
    found = settings(spliced(), lr=0.5, b_ratio=16, weight_decay=0.1)
    for name, (rate, decay) in found.items():
        last = name.rpartition(".")[2]
        assert rate == (8.0 if last == "b" else 0.5), name
        spared = last in ("bias", "key_b1", "key_b2", "value_b1", "value_b2") or ".ln_f." in name
        spared |= name == "transformer.wte.weight"
        assert decay == (0.0 if spared else 0.1), name
    assert {last for last in ("a", "b") if any(n.endswith(f".{last}") for n in found)} == {"a", "b"}


def test_without_a_ratio_all_have_one_rate() -> None:
    found = settings(spliced(), lr=0.5)
    assert set(found.values()) == {(0.5, 0.0)}
    assert "transformer.h.0.attn.c_attn.weight" not in found


@pytest.mark.parametrize(
    "given", [{"lr": 0}, {"lr": 1, "b_ratio": 0}, {"lr": 1, "weight_decay": -1}]
)
def test_numbers_out_of_range_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(surgery.SpliceError, match="must be above 0"):
        surgery.parameter_groups(spliced(), **given)


def test_a_model_that_trains_nothing_is_refused() -> None:
    with pytest.raises(surgery.SpliceError, match="requires a gradient"):
        surgery.parameter_groups(build("gpt2").requires_grad_(False), lr=1.0)


def test_the_stock_trainer_decays_only_what_decays(tmp_path: Path) -> None:
    model, rows = spliced(), [{"input_ids": i, "labels": i} for i in torch.arange(24).reshape(4, 6)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("value_b2", "key_b1")):
                parameter.fill_(1.0)
    model.requires_grad_(False)  # no gradient moves anything, decay alone would
    trained = dict(surgery.spliced_parameters(model)) | {
        "transformer.wte.weight": model.transformer.wte.weight
    }
    for parameter in trained.values():
        parameter.requires_grad_(True).register_hook(torch.zeros_like)
    before = {name: p.detach().clone() for name, p in trained.items()}
    groups = surgery.parameter_groups(model, lr=0.1, weight_decay=0.5)
    made = TrainingArguments(
        str(tmp_path), max_steps=1, save_strategy="no", report_to=[], use_cpu=True
    )
    optimizers = (torch.optim.AdamW(groups), None)
    Trainer(model, made, train_dataset=rows, optimizers=optimizers).train()
    same = {name for name, p in trained.items() if torch.equal(p, before[name])}
    assert "transformer.wte.weight" in same
    assert all(n in same for n in trained if n.endswith(("value_b2", "key_b1", ".bias")))
    assert not any(n in same for n in trained if n.endswith(".a"))
