"""LoRA of single parameters, as the stacks of experts, from and to PEFT, beside its own outputs."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import surgery
from tests.support.mixtures import IDS, moe
from tests.support.models import build, perturb
from tests.support.peft_cases import move

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PATTERNS = {
    "rank_pattern": {"down_proj": 2, r".*1.*gate_up_proj": 5, "q_proj": 1},
    "alpha_pattern": {r".*gate_up_proj": 3},
}
CHOICES: dict[str, dict[str, Any]] = {
    "with modules": {"target_modules": ["q_proj"], "target_parameters": STACKS},
    "one stack": {"target_modules": [], "target_parameters": ["down_proj"], "use_rslora": True},
    "patterns": {"target_modules": ["q_proj"], "target_parameters": STACKS, **PATTERNS},
    "one layer": {"target_parameters": [f"layers.1.{STACKS[0]}", f"layers.0.{STACKS[1]}"]},
}


def text(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(a: Any, b: Any) -> None:  # other products, in another order
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def adapted(model: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        config = peft.LoraConfig(r=3, **options)
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    move(theirs)
    return theirs


def reloaded(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


def tensors(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_file(folder / "adapter_model.safetensors")
    return found


def goes_there_and_back(model: Any, folder: Path, **options: Any) -> None:
    """PEFT's folder, ours from it, PEFT's from ours: equal outputs."""
    theirs = adapted(model, **options)
    expected = text(theirs)
    assert not torch.allclose(text(model), expected, atol=1e-3)
    theirs.save_pretrained(folder / "theirs")
    ours = surgery.load(copy.deepcopy(model), folder / "theirs")
    close(text(ours), expected)
    surgery.save(ours, folder / "ours", format="peft")
    close(text(reloaded(model, folder / "ours")), expected)
    close(text(surgery.from_peft(theirs)), expected)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe"])
@pytest.mark.few(4)
def test_stacks_of_experts_go_there_and_back(name: str, choice: str, tmp_path: Path) -> None:
    """GPT-OSS stores its stacks as (E, in, out), the others as (E, out, in)."""
    goes_there_and_back(moe(name, "grouped_mm"), tmp_path, **CHOICES[choice])
    first, again = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("gpt2", ["wte.weight"]), ("llama", ["q_proj.weight", "embed_tokens.weight"])],
)
def test_matrices_become_updates_of_their_modules(
    name: str, chosen: list[str], tmp_path: Path
) -> None:
    """PEFT takes the tokens of a table for its outputs."""
    model = build(name)
    if name == "gpt2":  # PEFT updates a tied table in one of its two modules alone
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    goes_there_and_back(model, tmp_path, target_modules=[], target_parameters=chosen)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(
    ranks=st.dictionaries(
        st.sampled_from(["up", r"layers\.0.*", r".*experts\.gate_up_proj$"]),
        st.integers(1, 4), max_size=2,
    ),
    ports=st.sampled_from([("up",), ("output",), "all"]),
    rslora=st.booleans(),
)  # fmt: skip
def test_what_was_trained_here_gives_the_same_outputs_in_peft(
    tmp_path_factory: pytest.TempPathFactory, ranks: dict[str, int], ports: Any, rslora: bool
) -> None:
    base = moe("mixtral", "grouped_mm")
    model = copy.deepcopy(base)
    lora = surgery.method("lora", rank=2, ports=ports, ranks=ranks, rslora=rslora)
    surgery.splice(model, lora, at=surgery.locate(model).experts)
    perturb(model, 0.3)
    folder = tmp_path_factory.mktemp("adapter")
    surgery.save(model, folder, format="peft")
    close(text(reloaded(base, folder)), text(model))
    again = surgery.load(copy.deepcopy(base), folder)
    close(text(again), text(model))
    surgery.save(again, folder / "again", format="peft")
    first, second = tensors(folder), tensors(folder / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_rank_can_be_given_to_one_stack() -> None:
    model = moe("mixtral", "grouped_mm")
    lora = surgery.method("lora", rank=2, ports="all", ranks={"down_proj": 5})
    report = surgery.splice(model, lora, at=surgery.locate(model).experts)
    found = {i.edit.port: model.get_submodule(i.path).a.shape[1] for i in report.inserted}
    assert found == {"up": 2, "output": 5}


def test_a_scale_that_was_changed_in_hand_is_taken_along() -> None:
    theirs = adapted(moe("mixtral", "grouped_mm"), target_modules=[], target_parameters=STACKS)
    outer = theirs.base_model.model.model.layers[0].mlp.experts
    outer.scaling["default"], outer.base_layer.scaling["default"] = 0.5, 3.0
    expected = text(theirs)
    close(text(surgery.from_peft(theirs)), expected)


def test_a_router_is_refused_by_name(tmp_path: Path) -> None:
    """PEFT's "all-linear" updates it, too."""
    model = moe("mixtral", "grouped_mm")
    adapted(model, target_modules="all-linear").save_pretrained(tmp_path)
    with pytest.raises(surgery.StoreError, match=r"no projections.*layers\.0\.mlp\.gate\.weight"):
        surgery.load(model, tmp_path)


def test_tensors_of_more_parameters_than_are_chosen_are_refused(tmp_path: Path) -> None:
    model = moe("mixtral", "grouped_mm")
    adapted(model, target_modules=[], target_parameters=STACKS).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for chosen, said in (
        (
            STACKS[:1],
            r"base_layer.lora_A.weight belongs to one of 2 .* chooses .*gate_up",
        ),
        ([*STACKS, "gate.weight"], r"it lacks .*layers\.0\.mlp\.gate.weight, one of 2"),
        ([3], r"target_parameters=\[3\]; names must"),
    ):
        file.write_text(json.dumps(config | {"target_parameters": chosen}))
        with pytest.raises(surgery.StoreError, match=said):
            surgery.load(model, tmp_path)


def test_a_dropout_that_peft_has_not_is_told(tmp_path: Path) -> None:
    model = moe("mixtral", "grouped_mm")
    sites = surgery.locate(model)
    lora = surgery.method("lora", rank=2, ports=("query", "up"), dropout=0.1)
    surgery.splice(model, lora, at=sites + sites.experts)
    with pytest.warns(UserWarning, match=r"dropout=0\.1 of the other modules is left out"):
        surgery.save(model, tmp_path, format="peft")
    assert text(reloaded(moe("mixtral", "grouped_mm"), tmp_path)).shape == text(model).shape
