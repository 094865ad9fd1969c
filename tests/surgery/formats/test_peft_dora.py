"""DoRA from and to PEFT, where test_peft_model.py does not look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import surgery
from tests.support.models import perturb
from tests.support.peft_cases import adapted, base, lora, reloaded, scores
from tests.support.pictures import pictures


def close(a: Any, b: Any) -> None:  # other products, in another order
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"ports": ("query", "value")}),  # two of the three parts of one projection
        ("gpt2", {"ports": "all", "fused": True, "rslora": True}),
        ("t5", {"ports": "all", "ranks": {"encoder": 1}, "alphas": {"block.1": 5}}),
        ("llama", {"ports": ("query", "up"), "dropout": 0.1}),
    ],
)
def test_what_was_trained_here_gives_the_same_outputs_in_peft(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = base(name)
    surgery.splice(model, surgery.method("dora", rank=2, **options))
    perturb(model, 0.3)
    expected = scores(model, name)
    surgery.save(model, tmp_path / "first", format="peft")
    close(scores(reloaded(name, tmp_path / "first"), name), expected)
    back = surgery.load(base(name), tmp_path / "first")
    close(scores(back, name), expected)
    surgery.save(back, tmp_path / "again", format="peft")
    files = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("first", "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_merged_it_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    theirs = adapted(name, lora(use_dora=True)(name))
    expected = scores(theirs, name)
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(base(name), tmp_path)
    surgery.merge(ours)
    close(scores(ours, name), expected)
    for key, weight in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], weight, rtol=1e-5, atol=1e-6)


def test_weights_are_swapped_under_a_running_splice(tmp_path: Path) -> None:
    theirs = adapted("llama", lora(use_dora=True, lora_alpha=3)("llama"))
    theirs.save_pretrained(tmp_path)
    model = base("llama")
    surgery.splice(model, surgery.method("dora", rank=8), name="first")
    surgery.hotswap(model, "first", tmp_path)
    close(scores(model, "llama"), scores(theirs, "llama"))


def test_dora_of_an_embedding_is_refused_by_name() -> None:
    theirs = adapted("llama", lora(use_dora=True, target_modules=["embed_tokens"])("llama"))
    with pytest.raises(surgery.StoreError, match=r"updates model.embed_tokens: an embedding"):
        surgery.from_peft(theirs)


def test_a_bias_beside_dora_is_refused_by_name(tmp_path: Path) -> None:
    """PEFT makes none; a config may say so."""
    adapted("llama", lora(use_dora=True)("llama")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_bias": false', '"lora_bias": true'))
    with pytest.raises(surgery.StoreError, match=r"a projection with lora_bias=True"):
        surgery.load(base("llama"), tmp_path)


def test_dora_of_a_convolution_is_refused_by_name(tmp_path: Path) -> None:
    model, x = pictures("2d")
    config = peft.LoraConfig(use_dora=True, target_modules=["first"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(surgery.StoreError, match="updates first: a convolution"):
        surgery.load(pictures("2d")[0], tmp_path, example_inputs=x)
