"""An adapter that is loaded upon other weights than it was trained upon says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.adapter.fingerprint import fingerprint
from tests.support.models import build, perturb


@pytest.fixture(name="saved")
def _saved(tmp_path: Path) -> Path:
    model = build("gpt2")
    surgery.splice(model, surgery.method("lora"))
    surgery.freeze_base(model, keep=["transformer.wpe"])
    perturb(model)
    return surgery.save(model, tmp_path / "adapter")


def _changed(by: float) -> Any:
    model = build("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.std(unbiased=False) * by * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("by", [0.01, 0.1, 3.0])
def test_other_weights_are_noticed(saved: Path, by: float) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"trained with other weights than this GPT2LMHeadModel"):
        model = surgery.load(_changed(by), saved)
    assert surgery.summary(model).inserted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_same_weights_in_another_dtype_are_the_same(saved: Path, dtype: torch.dtype) -> None:
    surgery.load(build("gpt2").to(dtype), saved)  # a warning is an error here


def test_what_was_trained_along_is_not_compared(saved: Path) -> None:
    known = json.loads((saved / "surgery.json").read_text())["base"]["fingerprint"]
    assert 2 <= len(known) <= 16
    assert "transformer.wpe.weight" not in known
    assert not any("lora" in name for name in known)
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    surgery.load(model, saved)


def test_adapters_of_before_are_loaded_without_it(saved: Path) -> None:
    file = saved / "surgery.json"
    description = json.loads(file.read_text())
    description["base"]["fingerprint"] = "0123456789abcdef"
    file.write_text(json.dumps(description))
    surgery.load(_changed(1.0), saved)


def test_the_numbers_are_normal_and_move_as_much_as_the_weights() -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleList(torch.nn.Linear(100, 100, bias=False) for _ in range(400))
    numbers = torch.tensor([fingerprint(m, ())["weight"] for m in model])
    assert abs(numbers.mean()) < 4 / math.sqrt(400)
    assert abs(numbers.std() - 1) < 4 / math.sqrt(800)
    before = fingerprint(model[0], ())["weight"]
    with torch.no_grad():
        model[0].weight += 1e-2 * model[0].weight.std() * torch.randn(100, 100)
    assert 0 < abs(fingerprint(model[0], ())["weight"] - before) < 5e-2
