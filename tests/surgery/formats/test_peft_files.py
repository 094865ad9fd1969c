"""Folders of PEFT that are damaged, hostile or made for another base: a StoreError, no change."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import surgery
from tests.support.models import build, inputs, logits
from tests.support.peft_folders import BASE, CONFIG, Q, Tensors, folder, refused, tensors, unchanged

BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'. What has a place here: LORA"),
    ({"peft_type": ["LORA"]}, "peft_type is"),
    ({"use_dora": True}, r"lacks the tensor .*lora_magnitude_vector.* of shape \(96,\)"),
    ({"use_dora": 1}, "use_dora=1, where bool must stand"),
    ({"target_parameters": ["experts.w"]}, "target_parameters"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' has changed the weights"),
    ({"r": 3}, r"lora_A.weight has the shape \(2, 32\), not \(3, 32\): r is 3, and"),
    ({"r": True}, "r=True, where int must stand"),
    ({"r": 10**30}, "the rank of transformer.h.0.attn.c_attn is 1"),
    ({"lora_alpha": 0}, "lora_alpha of transformer.h.0.attn.c_attn is 0"),
    ({"lora_alpha": float("nan")}, "lora_alpha of"),
    ({"lora_dropout": 2.0}, "dropout"),
    ({"lora_bias": True}, r"lacks the tensor .*lora_B.bias.weight of shape \(96,\)"),
    ({"rank_pattern": {"(.*.*)*x": 2}}, "may take for ever"),
    ({"alpha_pattern": {"c_attn": -1}}, "numbers > 0"),
    ({"alpha_pattern": {"(": 1}}, "may take for ever"),
    ({"rank_pattern": "x"}, "where dict must stand"),
]


@pytest.mark.parametrize(("change", "match"), BAD_CONFIGS)
def test_a_config_with_no_place_here_is_refused(
    change: dict[str, Any], match: str, tmp_path: Path
) -> None:
    start = time.monotonic()
    refused(folder(tmp_path, {**CONFIG, **change}), match)
    assert time.monotonic() - start < 20


def without(key: str) -> Callable[[Tensors], None]:
    return lambda found: found.__delitem__(key)


def given(key: str, value: Any) -> Callable[[Tensors], None]:
    return lambda found: found.update({key: value})


A = f"{Q}.lora_A.weight"
ROWS = "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"
BAD_TENSORS: list[tuple[Callable[[Tensors], None], str]] = [
    (without(A), r"lacks the tensor .*h.0.attn.c_attn.lora_A.weight of shape \(2, 32\)"),
    (given(A, torch.ones(2, 16)), r"\(2, 16\), not \(2, 32\): r is 2, and .* maps 32 to 96"),
    (given(A, torch.ones(64)), r"has the shape \(64,\)"),
    (given(A, torch.full((2, 32), torch.nan)), "NaN or infinity"),
    (given(A, torch.ones(2, 32, dtype=torch.int32)), "torch.int32"),
    (given(A.replace("c_attn", "q_proj"), torch.ones(2, 32)), "as transformer.h.0.attn.q_proj"),
    (given("transformer.x.weight", torch.ones(2)), "named without 'base_model.model.'"),
    (given(f"{Q}.lora_magnitude_vector.weight", torch.ones(96)), "does not say so"),
    (given(f"{Q}.lora_B.bias", torch.ones(96)), "although its config does not say so"),
    (given("base_model.model.transformer.wte.lora_embedding_A", torch.ones(2, 60)), "embedding_B"),
    (given("base_model.model.transformer.wte.lora_embedding_A", torch.ones(2, 9)), r"\(2, 60\)"),
    (given("base_model.model.no.such.weight", torch.ones(2)), "no.such.weight"),
    (given("base_model.model.transformer.wte.weight", torch.ones(60, 32)), "keep="),
    (given(ROWS, torch.ones(2, 32)), "trainable_token_indices names"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "match"), BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named_with_their_shapes(
    change: Callable[[Tensors], None], match: str, tmp_path: Path
) -> None:
    found = tensors()
    change(found)
    refused(folder(tmp_path, found=found), match)


@pytest.mark.parametrize(
    "chosen", [[1], [1, 1], [1, 99], [-1, 2], [True, 2], "x", {"wte": [1]}, {"x": [1, 2]}]
)
def test_rows_must_be_so_many_different_ones_of_the_embedding(chosen: Any, tmp_path: Path) -> None:
    found = tensors() | {ROWS: torch.ones(2, 32)}
    refused(folder(tmp_path, {**CONFIG, "trainable_token_indices": chosen}, found), "rows|where")


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (torch.ones(2, 16), r"wte.token_adapter\S* has the shape \(2, 16\).*\(60, 32\)"),
        (torch.ones(2, 32), r"wte.token_adapter\S* has the shape \(2, 32\) and is for the rows "
         r"\[1, 60\], and the table here has the shape \(60, 32\).*resize_token_embeddings"),
        (torch.ones(2, 32, dtype=torch.int32), "wte.token_adapter.* is of torch.int32"),
    ],
)  # fmt: skip
def test_rows_must_fit_the_table(rows: Tensor, match: str, tmp_path: Path) -> None:
    chosen = {**CONFIG, "trainable_token_indices": [1, 60 if "60\\]" in match else 5]}
    refused(folder(tmp_path, chosen, tensors() | {ROWS: rows}), match)


def test_rows_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    found = tensors() | {ROWS: torch.full((2, 32), torch.inf)}
    refused(folder(tmp_path, {**CONFIG, "trainable_token_indices": [1, 5]}, found), "infinity")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 10**5, '{"peft_type": 1}', "\x00"])
def test_a_config_that_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    refused(folder(tmp_path, text), "damaged|peft_type")


def test_a_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    refused(tmp_path, "adapter_model.safetensors is damaged")
    path.unlink()
    refused(tmp_path, "neither adapter_model.safetensors nor adapter_model.bin")
    path.symlink_to("/dev/zero")
    refused(tmp_path, "not a plain file")


VALUES: list[Any] = [
    None, True, -1, 0, 10**30, 1e308, "", "x" * 5000, ".*" * 40, [], {}, ["x"], {"x": 1},
    [[[[1]]]], {"c_attn": 3}, "LORA", "IA3", "PREFIX_TUNING",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*unknown here")
def test_changes_at_random_are_loaded_or_refused_with_nothing_changed(tmp_path: Path) -> None:
    """Configs and tensors with values, keys and shapes changed at random."""
    rng = random.Random(7)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(60):
        config, found = copy.deepcopy(CONFIG), tensors()
        for _ in range(rng.choice([1, 1, 2])):
            if rng.random() < 0.6:
                config[rng.choice([*CONFIG, "use_rslora", "lora_bias", "num_virtual_tokens"])] = (
                    rng.choice(VALUES)
                )
            else:
                key = rng.choice([*found])
                value = found.pop(key)
                new = rng.choice([value, value[:1], value.T.contiguous(), value * torch.inf])
                found[rng.choice([key, key + ".x", key.replace("h.0", "h.7"), "x"])] = new
        try:
            surgery.load(BASE, folder(tmp_path, config, found))
            outcomes["loaded"] += 1
            surgery.remove(BASE)
        except surgery.StoreError:
            outcomes["refused"] += 1
        unchanged()
    assert outcomes["loaded"] > 5
    assert outcomes["refused"] > 30


def test_a_folder_of_both_formats_is_read_as_the_own_one(tmp_path: Path) -> None:
    model = build("gpt2")
    surgery.splice(model, surgery.method("lora", rank=1))
    surgery.save(model, tmp_path)
    loaded = surgery.load(build("gpt2"), folder(tmp_path))
    assert surgery.summary(loaded).inserted == surgery.summary(model).inserted


def test_the_file_may_not_be_larger_than_an_adapter_of_this_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.adapter.loading.bound", lambda model: 100)
    refused(folder(tmp_path), "more than the 100 that")


def test_keys_with_the_name_of_the_adapter_are_read_too(tmp_path: Path) -> None:
    """As PEFT reads them."""
    named = {key.replace(".weight", ".default.weight"): x for key, x in tensors().items()}
    a = surgery.load(build("gpt2"), folder(tmp_path, found=named))
    b = surgery.load(build("gpt2"), folder(tmp_path))
    assert torch.equal(logits(a, inputs("gpt2")), logits(b, inputs("gpt2")))
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 4


def test_an_option_that_is_unknown_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="unknown here: \\['new_option'\\]"):
        surgery.load(build("gpt2"), folder(tmp_path, {**CONFIG, "new_option": 3}))


def test_two_adapters_have_names_of_their_own(tmp_path: Path) -> None:
    model, case = build("gpt2"), inputs("gpt2")
    other = {key: -x for key, x in tensors().items()}
    folders = {"a": folder(tmp_path / "a"), "b": folder(tmp_path / "b", found=other)}
    for name, path in folders.items():
        surgery.load(model, path, name=name)
    for name, off in (("a", "b"), ("b", "a")):
        with surgery.disabled(model, off):
            alone = surgery.load(build("gpt2"), folders[name])
            assert torch.equal(logits(model, case), logits(alone, case))


def test_ia3_at_the_side_that_is_not_rescaled_here_is_refused(tmp_path: Path) -> None:
    config = {"peft_type": "IA3", "target_modules": ["c_proj"], "feedforward_modules": []}
    key = "base_model.model.transformer.h.0.mlp.c_proj.ia3_l"
    path = folder(tmp_path, config, {key: torch.ones(32, 1)})
    refused(path, r"\(32, 1\), not \(1, 128\): the input of .*mlp.c_proj.* is rescaled here")


def test_a_prefix_needs_as_many_layers_and_a_prompt_the_width(tmp_path: Path) -> None:
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "num_layers": 3}
    path = folder(tmp_path, config, {"prompt_embeddings": torch.ones(3, 192)})
    refused(path, r"\(3, 192\), not \(3, 128\): 3 tokens, and 2 layers of 4 heads of 8")
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**9}
    path = folder(tmp_path, config, {"prompt_embeddings": torch.ones(3, 32)})
    refused(path, r"\(3, 32\), not \(1000000000, 32\)")
