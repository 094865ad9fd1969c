"""Tests of the presets: each does what its parts do one by one, with the papers' counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from tests.support.models import build, gpt2_small, inputs, logits, perturb, roberta_base

PRESETS = ("inducer_lora", "mam_inducer", "mam_adapter")
SMALL: dict[str, dict[str, Any]] = {
    "inducer_lora": {"key_rank": 2, "value_rank": 2, "lora_rank": 2},
    "mam_inducer": {"key_rank": 2, "value_rank": 2, "lora_rank": 2, "ffn_rank": 3, "scale": 2.0},
    "mam_adapter": {"length": 2, "rank": 3},
}


@pytest.mark.parametrize("model_name", ["gpt2", "llama", "roberta"])
@pytest.mark.parametrize("name", [*PRESETS, "inducer_lora paper", "mam_inducer paper"])
@pytest.mark.few(6)
def test_a_preset_is_its_parts_one_by_one(name: str, model_name: str) -> None:
    model, twin, given = build(model_name), build(model_name), inputs(model_name)
    base = logits(model, given)
    name, _, start = name.partition(" ")
    preset: Any = surgery.method(name, **SMALL[name], **({"init": start} if start else {}))
    torch.manual_seed(0)
    surgery.splice(model, preset)
    surgery.splice(twin, preset.parts)
    assert torch.equal(logits(model, given), base) == (preset.start == "exact")
    ours, theirs = (dict(surgery.spliced_parameters(m)) for m in (model, twin))
    assert ours.keys() == theirs.keys()
    perturb(model, 0.3)
    with torch.no_grad():
        for key, parameter in theirs.items():
            parameter.copy_(ours[key])
    assert torch.equal(logits(model, given), logits(twin, given))
    assert not torch.equal(logits(model, given), base)


@pytest.mark.parametrize(
    ("name", "options", "base", "count"),
    [
        ("inducer_lora", {}, gpt2_small, 2_002_320),
        ("mam_inducer", {}, gpt2_small, 2_001_816),
        pytest.param(
            "mam_inducer", {"layer_norm": True}, gpt2_small, 2_020_248, marks=pytest.mark.slow
        ),
        ("mam_adapter", {"length": 6, "rank": 102}, gpt2_small, 2_001_096),
        pytest.param("mam_adapter", {}, gpt2_small, 10_005_504, marks=pytest.mark.slow),
        pytest.param(
            "mam_adapter",
            {"length": 16, "rank": 16, "scale": 2.0},
            roberta_base,
            599_232,
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.few(1)
def test_parameter_counts_are_those_of_the_papers(
    name: str, options: Any, base: Any, count: int
) -> None:
    with torch.device("meta"):
        model = base()
    surgery.splice(model, surgery.method(name, **options))
    assert surgery.summary(model).inserted == count


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_saved_under_its_own_name(name: str, tmp_path: Path) -> None:
    model, given = build("gpt2"), inputs("gpt2")
    surgery.splice(model, surgery.method(name, **SMALL[name]))
    perturb(model, 0.3)
    surgery.save(model, tmp_path)
    assert f'"{name}"' in (tmp_path / "surgery.json").read_text()
    loaded = surgery.load(build("gpt2"), tmp_path)
    assert torch.equal(logits(loaded, given), logits(model, given))


def test_a_bad_option_is_named_by_the_part_that_has_it() -> None:
    with pytest.raises(surgery.MethodError, match="method 'ffn_adapter': rank=0"):
        surgery.method("mam_adapter", rank=0)
