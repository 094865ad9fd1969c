"""What may befall a spliced model: merges in turn, parts of a model, damaged and shared folders."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import surgery
from tests.models import build, inputs, logits, perturb


def spliced(kind: str, *methods: Any, **options: Any) -> Any:
    model = build(kind)
    surgery.splice(model, list(methods), **options)
    perturb(model)
    return model


def test_a_tie_of_two_parameters_in_one_place_is_not_merged_into() -> None:
    model = build("gpt2")
    model.load_state_dict(model.state_dict(), assign=True)  # tied by storage, not by object
    assert model.lm_head.weight is not model.transformer.wte.weight
    head = surgery.locate(model).linear
    surgery.splice(model, surgery.method("lora", rank=2, ports=("output",)), at=head)
    with pytest.raises(surgery.SpliceError, match=r"is also .*, which must stay as it is"):
        surgery.merge(model)


def test_merges_are_undone_from_the_last() -> None:
    model = spliced("gpt2", surgery.method("lora", rank=2), name="a")
    surgery.splice(model, surgery.method("lora", rank=2), name="b")
    perturb(model, seed=5)
    original = logits(build("gpt2"), inputs("gpt2"))
    first = surgery.merge(model, "a")
    between = logits(copy.deepcopy(model), inputs("gpt2"))
    second = surgery.merge(model, "b")
    with pytest.raises(surgery.SpliceError, match="Undo later merges first"):
        first.undo(model)
    torch.testing.assert_close(logits(model, inputs("gpt2")), between, rtol=0, atol=1e-5)
    second.undo(model)
    first.undo(model)
    assert torch.equal(logits(model, inputs("gpt2")), original)


def test_a_gating_model_is_saved_like_any_other(tmp_path: Path) -> None:
    model = spliced("gpt2", surgery.method("inducer", variant="gating"))
    model.save_pretrained(tmp_path)
    assert any(tmp_path.iterdir())


def test_an_exact_splice_goes_inside_a_trained_one_around_its_block() -> None:
    model = spliced("roberta", surgery.method("ffn_adapter", placement="block", rank=2), name="a")
    before = logits(model, inputs("roberta"))
    surgery.splice(model, surgery.method("lora", ports=("up",), rank=2), name="b")
    assert torch.equal(logits(model, inputs("roberta")), before)


def test_rows_are_trained_beside_those_before_and_a_replaced_parameter_is_named() -> None:
    model, name = build("gpt2"), "transformer.wte.weight"
    surgery.splice(model, surgery.method("lora", rank=2))
    surgery.freeze_base(model)
    surgery.train_rows(model, name, [3])
    surgery.train_rows(model, name, [1, 3])
    model(**inputs("gpt2"), labels=inputs("gpt2")["input_ids"]).loss.backward()
    touched = model.transformer.wte.weight.grad.abs().sum(1) > 0
    assert set(touched.nonzero().flatten().tolist()) <= {1, 3}
    model.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(surgery.SpliceError, match="is another parameter now"):
        surgery.summary(model)


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no kept": lambda d: d.pop("kept"),
    "kept without a tensor": lambda d: d["kept"].append("transformer.wte.weight"),
    "kept is text": lambda d: d.update(kept="transformer"),
    "no base": lambda d: d.pop("base"),
    "no fingerprint": lambda d: d["base"].pop("fingerprint"),
    "no modules": lambda d: d["splices"][0].pop("modules"),
    "no path": lambda d: d["splices"][0]["sites"][0].pop("path"),
    "no splices": lambda d: d.update(splices=None),
    "options in a list": lambda d: d["splices"][0]["methods"][0].update(options=[1]),
    "a row before the first": lambda d: d["rows"].update({"transformer.wte.weight": [-1]}),
    "rows of another": lambda d: d["rows"].update({"transformer.wpe.weight": [0]}),
    "a file elsewhere": lambda d: d.update(tensors="../" + d["tensors"]),
    "a file that is a number": lambda d: d.update(tensors=3),
    "a list": lambda d: d.update(base=[]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_description_changes_nothing(tmp_path: Path, damage: str) -> None:
    model = spliced("gpt2", surgery.method("lora", rank=2))
    surgery.freeze_base(model, keep=["transformer.ln_f"])
    surgery.train_rows(model, "transformer.wte.weight", [2])
    surgery.save(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "surgery.json"
    description = json.loads(path.read_text())
    for file in (tmp_path / "adapter").glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    DAMAGE[damage](description)
    path.write_text(json.dumps(description))
    base = build("gpt2")
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(surgery.StoreError, match="damaged"):
        surgery.load(base, tmp_path / "adapter")
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(base.state_dict()[name], x) for name, x in before.items())


def test_a_save_removes_no_file_but_its_predecessor(tmp_path: Path) -> None:
    model = spliced("gpt2", surgery.method("lora", rank=2))
    surgery.save(model, tmp_path)
    (first,) = tmp_path.glob("*.safetensors")
    theirs = tmp_path / "surgery-000000000000.safetensors"  # of somebody who is saving, too
    theirs.write_bytes(b"")
    perturb(model, seed=8)
    surgery.save(model, tmp_path)
    assert theirs.exists()
    assert not first.exists()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


class Gain(nn.Linear):
    """Nearly the linear map that its weight says."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 1.03 * self.weight, self.bias)


def test_a_projection_that_is_nearly_plain_is_not_merged_into() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.__class__ = Gain
    surgery.splice(model, surgery.method("lora", rank=2, ports=("query",)))
    with pytest.raises(surgery.SpliceError, match="not made by one plain floating-point matrix"):
        surgery.merge(model)


def test_an_adapter_that_replaces_the_head_of_another_says_so(tmp_path: Path) -> None:
    base = build("roberta")
    for seed, name in enumerate("ab"):
        model = copy.deepcopy(base)
        surgery.splice(model, surgery.method("lora", rank=2), name=name)
        surgery.freeze_base(model, keep=["classifier"])
        with torch.no_grad():
            model.classifier.out_proj.weight.add_(seed + 1.0)
        surgery.save(model, tmp_path / name)
    model = copy.deepcopy(base)
    surgery.load(model, tmp_path / "a")
    surgery.remove(model, "a")
    surgery.load(model, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"its own classifier.out_proj.weight, in place of .* a\."):
        surgery.load(model, tmp_path / "b")


def test_a_parametrized_projection_is_spliced_into() -> None:
    model = build("llama")
    weight_norm(model.model.layers[0].self_attn.q_proj)
    before = logits(model, inputs("llama"))
    surgery.splice(model, surgery.method("lora", rank=2))
    assert torch.equal(logits(model, inputs("llama")), before)
    perturb(model)
    assert not torch.equal(logits(model, inputs("llama")), before)


def test_children_that_change_later_are_those_that_are_called() -> None:
    """A graph finds them in the host's own dictionary, and a replica of the host has another."""
    model, x = spliced("gpt2", surgery.method("lora", rank=2)), torch.randn(2, 5, 32)
    attn = model.transformer.h[0].attn
    attn(x)
    replica = attn._replicate_for_data_parallel()  # a flat copy, as DataParallel runs it
    replica.register_module("c_proj", nn.Linear(32, 32))
    replica._modules["c_attn"], replica._modules["lora_query"] = attn.c_attn, attn.lora_query
    expected = torch.randn(0)
    for _ in range(3):  # in turn, with graphs that are known by now
        seen: list[Tensor] = []
        hook = attn.c_proj.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        expected = attn(x)[0]
        hook.remove()
        torch.testing.assert_close(replica(x)[0], replica.c_proj(seen[0]), rtol=0, atol=1e-6)
        assert torch.equal(attn(x)[0], expected)
    attn.c_proj = replica.c_proj
    assert torch.equal(attn(x)[0], replica(x)[0])
    assert not torch.equal(attn(x)[0], expected)


def test_a_host_that_nobody_needs_is_gone_at_once() -> None:
    model, x = spliced("gpt2", surgery.method("lora", rank=2)), torch.randn(2, 5, 32)
    attn = model.transformer.h[0].attn
    for _ in range(3):
        attn(x)
    state = vars(attn)["_surgery"]
    assert state.recent
    assert state.children is not None
    replica = attn._replicate_for_data_parallel()
    for name, child in attn.named_children():
        replica._modules[name] = child
    assert torch.equal(replica(x)[0], attn(x)[0])
    assert state.children.belongs_to(attn)
    gone = weakref.ref(replica)
    del replica
    assert gone() is None
