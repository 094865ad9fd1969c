"""PEFT both ways: files read, files written, and models in hand, beside PEFT's own outputs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.adapter import peft_conversion
from tests.support.models import build, inputs, logits
from tests.support.peft_cases import CONFIGS, TASKS, adapted, base, lora, reloaded, scores

QUICK = [("gpt2", "lora_rs"), ("roberta", "lora_everywhere"), ("llama", "lora_patterns"),
         ("t5", "prompt"), ("mixtral", "prefix"), ("gpt2", "ia3"),
         ("gpt2", "lora_embedding"), ("t5", "lora_rows"),
         ("gpt2", "dora"), ("llama", "dora")]  # fmt: skip
DISTANCES = [("t5", "prefix"), ("t5", "prefix_mlp")]
NOT_REACHED = [("t5", "lora_embedding")]  # PEFT wraps T5's table at a path that no forward uses
ALL = [(m, c) for m in TASKS for c in CONFIGS if (m, c) not in DISTANCES + NOT_REACHED]


def close(a: Any, b: Any) -> None:  # PEFT adds other products, in another order
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(*c, marks=[] if c in QUICK else pytest.mark.slow) for c in ALL],
)
@pytest.mark.few(4)
def test_there_and_back(name: str, kind: str, tmp_path: Path) -> None:
    """PEFT's folder, ours from it, PEFT's from ours: equal outputs, and tensors with its bits."""
    theirs = adapted(name, CONFIGS[kind](name))
    expected = scores(theirs, name)
    assert not torch.allclose(scores(base(name), name), expected, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")

    ours = surgery.load(base(name), tmp_path / "theirs")
    assert type(ours) is type(base(name))
    close(scores(ours, name), expected)

    surgery.save(ours, tmp_path / "ours", format="peft")
    close(scores(reloaded(name, tmp_path / "ours"), name), expected)
    files = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours")]
    copies = ("modules_to_save", "original", "base_layer.weight")  # of the base's own
    first = {k: x for k, x in files[0].items() if not any(part in k for part in copies)}
    assert first.keys() == files[1].keys()
    for key, tensor in files[1].items():  # PEFT never uses its rows for a decoder
        near = 1e-6 if "trainable_tokens" in key else 0  # they are held as what they add
        torch.testing.assert_close(first[key][: len(tensor)], tensor, rtol=0, atol=near)
        assert first[key].shape == tensor.shape or (name, key) == ("t5", "prompt_embeddings")

    surgery.save(ours, tmp_path / "own")
    again = surgery.load(base(name), tmp_path / "own")
    assert torch.equal(scores(again, name), scores(ours, name))

    in_hand = surgery.from_peft(theirs)
    close(scores(in_hand, name), expected)
    assert not [m for m in in_hand.modules() if type(m).__module__.startswith("peft")]
    assert not hasattr(in_hand, "peft_config")


@pytest.mark.parametrize(("name", "table"), [("gpt2", "wpe"), ("roberta", "position_embeddings")])
def test_a_table_of_positions_is_refused_by_name(name: str, table: str, tmp_path: Path) -> None:
    theirs = adapted(name, lora(target_modules=[table])(name))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(surgery.StoreError, match=rf"updates \S*{table}, a table of positions"):
        surgery.load(base(name), tmp_path)
    with pytest.raises(surgery.StoreError, match=rf"updates \S*{table}, a table of positions"):
        surgery.from_peft(theirs)


def test_several_adapters_keep_their_names() -> None:
    theirs = adapted("gpt2", lora()("gpt2"))
    expected = {"default": scores(theirs, "gpt2")}
    second = lora(r=2, target_modules=["c_proj"], fan_in_fan_out=True)("gpt2")
    theirs.add_adapter("second", second)
    theirs.set_adapter("second")
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected["second"] = scores(theirs, "gpt2")
    ours = surgery.from_peft(theirs)
    assert {r.name for r in surgery.summary(ours).reports} == {"default", "second"}
    close(scores(ours, "gpt2"), expected["second"])  # which was active
    for name in ("default", "second"):
        surgery.use(ours, name)
        close(scores(ours, "gpt2"), expected[name])


def test_a_scale_that_was_set_at_run_time_counts() -> None:
    theirs = adapted("llama", lora()("llama"))
    for module in theirs.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    expected = scores(theirs, "llama")
    close(scores(surgery.from_peft(theirs), "llama"), expected)


def test_what_is_no_peft_model_or_is_merged_is_refused_and_stays() -> None:
    with pytest.raises(surgery.SpliceError, match=r"is no peft.PeftModel"):
        surgery.from_peft(base("gpt2"))
    theirs = adapted("gpt2", lora()("gpt2"))
    theirs.merge_adapter()
    expected = scores(theirs, "gpt2")
    with pytest.raises(surgery.SpliceError, match="unmerge_adapter"):
        surgery.from_peft(theirs)
    assert torch.equal(scores(theirs, "gpt2"), expected)


def test_what_has_no_place_leaves_the_peft_model_as_it_was() -> None:
    config = peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    theirs = adapted("llama", config)
    expected = scores(theirs, "llama")
    with pytest.raises(surgery.StoreError, match="peft_type is 'LOHA'"):
        surgery.from_peft(theirs)
    assert torch.equal(scores(theirs, "llama"), expected)


def test_a_second_adapter_that_fails_leaves_the_head_of_the_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = adapted("roberta", lora()("roberta"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_adapter("second", lora(r=2)("roberta"))
    head = theirs.base_model.model.classifier.original_module
    before = {name: x.clone() for name, x in head.state_dict().items()}
    expected, calls = scores(theirs, "roberta"), []

    def failing(*given: Any, **options: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise surgery.StoreError("the second fails")
        load(*given, **options)

    load = peft_conversion.load_opened
    monkeypatch.setattr(peft_conversion, "load_opened", failing)
    with pytest.raises(surgery.StoreError, match="the second fails"):
        surgery.from_peft(theirs)
    assert all(torch.equal(x, before[name]) for name, x in head.state_dict().items())
    assert torch.equal(scores(theirs, "roberta"), expected)


def test_add_adapter_of_transformers_is_left_alone() -> None:
    """Its layers are modules of the model as any other; a splice works beside and on them."""
    model = base("llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="own")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = scores(model, "llama")
    assert not torch.allclose(expected, scores(base("llama"), "llama"), atol=1e-3)
    surgery.splice(model, surgery.method("lora", rank=2))
    assert torch.equal(scores(model, "llama"), expected)
    model.disable_adapters()
    torch.testing.assert_close(scores(model, "llama"), scores(base("llama"), "llama"))
    model.enable_adapters()
    surgery.remove(model)
    assert torch.equal(scores(model, "llama"), expected)
    assert model.active_adapters() == ["own"]


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_adapters_that_are_switched_off_stay_off() -> None:
    theirs = peft.get_peft_model(
        build("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    given = inputs("llama")
    on = logits(theirs, given)
    theirs.base_model.disable_adapter_layers()
    off = logits(theirs, given)
    model = surgery.from_peft(theirs)
    assert torch.equal(logits(model, given), off)
    surgery.use(model)
    torch.testing.assert_close(logits(model, given), on, rtol=0, atol=1e-6)
