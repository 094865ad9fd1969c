"""The tensors of a PEFT folder are those that its config chooses and announces, or are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import surgery
from tests.support.models import build, inputs, logits
from tests.support.peft_folders import CONFIG, Q, folder, refused, tensors

BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"modules_to_save": 5}, "modules_to_save=5, where list must stand"),
    ({"modules_to_save": ["nothing"]}, r"modules \['nothing'\] whole, and this model has none"),
    ({"bias": "evil"}, "bias='evil', not one of none, all, lora_only"),
    ({"bias": 5}, "bias=5, where str must stand"),
    ({"layers_to_transform": "x"}, "layers_to_transform='x', where int or list"),
    ({"layers_to_transform": [99]}, r"\(2, 32\) updates .*layers_to_transform=\[99\]"),
    ({"layers_to_transform": 0}, r"h.1.attn.c_attn.lora_A.weight' \(2, 32\) updates"),
    ({"target_modules": 5}, "target_modules=5, where str or list must stand"),
    ({"target_modules": [["x"]]}, "names must stand there"),
    ({"target_modules": ["c_fc"]}, r"lacks .*h.0.mlp.c_fc.lora_A.weight \(2, 32\), .*\(128, 2\)"),
    ({"target_modules": ".*h.0.*c_attn"}, r"updates 'transformer.h.1.attn.c_attn'"),
    ({"target_modules": "all-linear"}, "one of 6 modules that its config chooses"),
    (
        {"target_modules": ["c_attn", "lm_head"]},
        r"lacks .*lm_head.* \(60, 2\) of lm_head, one of 1",
    ),
    ({"exclude_modules": ["h.0.attn.c_attn"]}, "updates 'transformer.h.0.attn.c_attn'"),
    ({"trainable_token_indices": [1]}, "lacks the tensors .*trainable_tokens_delta"),
    ({"modules_to_save": [""]}, "names of modules must stand there"),
]


@pytest.mark.parametrize(("change", "match"), BAD_CONFIGS)
def test_a_config_that_the_tensors_do_not_follow_is_refused(
    change: dict[str, Any], match: str, tmp_path: Path
) -> None:
    refused(folder(tmp_path, {**CONFIG, **change}), match)


A = f"{Q}.lora_A.weight"
BAD_TENSORS: list[tuple[str, tuple[int, ...], str]] = [
    (A.replace(".weight", ".default.weight"), (1,), r"\(1,\) and .* are two tensors"),
    (f"{Q}.base_layer.weight", (32, 96), r"base_layer.weight' \(32, 96\) is a tensor"),
    (f"{Q}.weight", (32, 96), r"c_attn.weight' \(32, 96\) is a .* not announce"),
    (f"{Q}.bias", (96,), r"c_attn.bias' \(96,\) is a tensor of the base"),
    ("base_model.model.transformer.ln_f.weight", (32,), "modules_to_save is None"),
    ("base_model.model.x.original_module.weight", (3,), "does not announce"),
]


@pytest.mark.parametrize(("key", "shape", "match"), BAD_TENSORS)
def test_a_tensor_that_the_config_does_not_announce_is_refused(
    key: str, shape: tuple[int, ...], match: str, tmp_path: Path
) -> None:
    refused(folder(tmp_path, found=tensors() | {key: torch.ones(shape)}), match)


@pytest.mark.parametrize("layers", [[0], [1], []])
def test_both_factors_of_each_chosen_module_must_be_there(
    layers: list[int], tmp_path: Path
) -> None:
    found = {k: x for k, x in tensors().items() if any(f"h.{n}." in k for n in layers)}
    message = r"lacks .*lora_A.weight \(2, 32\), .*lora_B.weight \(96, 2\) of .*c_attn, one of 1"
    refused(folder(tmp_path, found=found), message if layers else "updates no module")


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": r"transformer\.h\.\d+\.attn\.c_attn"},
        {"target_modules": ["attn.c_attn", "c_fc"], "exclude_modules": ".*c_fc"},
        {"layers_to_transform": [0, 1], "layers_pattern": "h"},
        {"target_modules": ["c_attn"] * 100_000},
        {"target_modules": None},
    ],
)
def test_a_choice_of_modules_as_peft_makes_it_is_taken(
    change: dict[str, Any], tmp_path: Path
) -> None:
    found = surgery.load(build("gpt2"), folder(tmp_path / "a", {**CONFIG, **change}))
    same = surgery.load(build("gpt2"), folder(tmp_path / "b"))
    assert torch.equal(logits(found, inputs("gpt2")), logits(same, inputs("gpt2")))


def test_a_choice_by_a_slow_pattern_is_not_run_and_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="may take for ever, so its tensors are not compared"):
        surgery.load(build("gpt2"), folder(tmp_path, {**CONFIG, "target_modules": "(a+)+$"}))


def test_modules_of_a_splice_are_not_chosen(tmp_path: Path) -> None:
    model = build("gpt2")
    surgery.splice(model, surgery.method("lora", rank=1), name="first")
    surgery.load(
        model, folder(tmp_path, {**CONFIG, "target_modules": r".*attn\.(c_attn|lora.*)"}), name="b"
    )
    assert [r.name for r in surgery.summary(model).reports] == ["first", "b"]


def test_a_module_to_save_needs_all_its_tensors(tmp_path: Path) -> None:
    """A tied one comes under either name; equal copies are one."""
    config = {**CONFIG, "modules_to_save": ["ln_f"]}
    refused(folder(tmp_path, config), r"lacks the tensor .*ln_f.weight of shape \(32,\), which")
    norm = {f"base_model.model.transformer.ln_f.{p}": torch.ones(32) for p in ("weight", "bias")}
    surgery.load(build("gpt2"), folder(tmp_path, config, tensors() | norm))
    copies = {key.replace("ln_f", "ln_f.modules_to_save"): x.clone() for key, x in norm.items()}
    copies |= {key.replace("ln_f", "ln_f.original_module"): x * 2 for key, x in norm.items()}
    surgery.load(build("gpt2"), folder(tmp_path, config, tensors() | norm | copies))
    key = "base_model.model.transformer.ln_f.base_layer.weight"
    found = tensors() | norm | {key: torch.zeros(32)}
    refused(folder(tmp_path, config, found), r"\(32,\) and .* are two tensors for one place")


def test_a_leaf_beside_a_resized_vocabulary_comes_three_times(tmp_path: Path) -> None:
    """As PEFT saves a head of modules_to_save whose table has new rows."""
    config = {**CONFIG, "modules_to_save": ["wpe"]}
    table = torch.ones(build("gpt2").transformer.wpe.weight.shape)
    path = "base_model.model.transformer.wpe"
    found = {f"{path}.weight": table, f"{path}.modules_to_save.weight": table.clone()}
    found[f"{path}.original_module.weight"] = table * 2
    model = surgery.load(build("gpt2"), folder(tmp_path, config, tensors() | found))
    assert torch.equal(model.transformer.wpe.weight, table)


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers
def test_tied_modules_that_peft_updates_alike_may_come_twice_or_once(tmp_path: Path) -> None:
    plain = build("llama")
    plain.config.tie_word_embeddings = True
    llama = type(plain)(plain.config).eval()
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True
    )
    peft.get_peft_model(copy.deepcopy(llama), config).save_pretrained(tmp_path)
    assert "lm_head.lora_A" in str([*load_file(tmp_path / "adapter_model.safetensors")])
    surgery.load(llama, tmp_path)
