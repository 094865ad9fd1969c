"""LoRA of loralib, beside the weights that it stands for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers as tr
from safetensors.torch import save_file

import surgery
from tests.support.loralib_groups import LAYERS, by_hand, grouped
from tests.support.models import build, inputs, logits


def test_groups_of_a_fused_projection_are_its_ports(tmp_path: Path) -> None:
    pairs = grouped(LAYERS)
    found = {f"{x}.lora_{n}": t for x, ab in pairs.items() for n, t in zip("AB", ab, strict=True)}
    torch.save(found, tmp_path / "lora.bin")
    model = surgery.load_loralib(build("gpt2"), tmp_path / "lora.bin", alpha=6, name="old")
    torch.testing.assert_close(logits(model, inputs("gpt2")), by_hand(pairs, 3.0))
    report = surgery.summary(model).reports[0]
    assert report.name == "old"
    assert {i.edit.port for i in report.inserted} == {"query", "value"}


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    a, b = torch.ones(4, 32), torch.ones(64, 2)
    file = tmp_path / "lora.safetensors"
    for found, options, match in (
        ({f"{LAYERS[0]}.lora_A": a}, {}, "lacks lora_B of"),
        ({"x.lora_A": a, "x.lora_B": b}, {}, "no projections that a site"),
        ({f"{LAYERS[0]}.lora_A": a[:, :8].clone(), f"{LAYERS[0]}.lora_B": b}, {}, "map 32 to 96"),
        ({f"{LAYERS[0]}.lora_A": a, f"{LAYERS[0]}.lora_B": b}, {"enabled": [True] * 3}, "enabled="),
        ({f"{LAYERS[0]}.lora_A": a, f"{LAYERS[0]}.lora_B": b}, {"alpha": 0}, "alpha is 0"),
    ):  # fmt: skip
        save_file(found, file)
        with pytest.raises(surgery.StoreError, match=match):
            surgery.load_loralib(build("gpt2"), file, **{"alpha": 2, **options})  # type: ignore[arg-type]
    with pytest.raises(surgery.StoreError, match="no such file"):
        surgery.load_loralib(build("gpt2"), tmp_path / "none.bin", alpha=2)


@pytest.mark.slow
@pytest.mark.data
def test_the_adapter_that_the_authors_trained_on_mnli() -> None:
    """Microsoft's release for RoBERTa-base: 24 projections and the head of three classes."""
    folder = Path(os.environ["SURGERY_DATA"]) / "lora_roberta_base_mnli"
    file = folder / "roberta_base_lora_mnli.bin"
    torch.manual_seed(0)
    config = tr.RobertaConfig(num_labels=3, vocab_size=200, max_position_embeddings=40)
    model = tr.RobertaForSequenceClassification(config).eval()
    ids = torch.randint(3, 200, (2, 12))
    state = torch.load(file, map_location="cpu", weights_only=True)
    merged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for key in [key for key in state if key.endswith("lora_A")]:
        path = key.removesuffix(".lora_A")
        merged[f"{path}.weight"] += state[f"{path}.lora_B"] @ state[key] * (16 / 8)
    merged |= {key: tensor for key, tensor in state.items() if "lora_" not in key}
    surgery.load_loralib(model, file, alpha=16)
    with torch.no_grad():
        found = model(ids).logits
        surgery.remove(model)
        model.load_state_dict(merged)
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)
