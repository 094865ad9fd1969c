"""Merging: exact to the dtype, in the listed order, all or nothing, and it can be undone."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import surgery
from surgery.host.state import hosts
from tests.support.models import NAMES, build, inputs, logits, perturb
from tests.support.splices import built_with

BEHIND = [
    ("ffn_adapter", {"rank": 2, "placement": "pfeiffer"}),
    ("ssb", {"ports": ("output",)}),
]


LINEAR = [
    ("lora", {"rank": 2, "ports": ("query", "value")}),
    ("lora", {"rank": 2, "ports": ("key", "output", "up"), "rslora": True}),
    ("ia3", {}),
    ("ssl", {}),
    ("ssb", {"ports": ("query", "key", "up", "output")}),
    ("ssb", {}),
]


def spliced(name: str, chosen: list[Any], dtype: torch.dtype = torch.float64) -> Any:
    model = build(name).to(dtype)
    example = _case(name, dtype)
    surgery.splice(model, [surgery.method(n, **o) for n, o in chosen], example_inputs=example)
    perturb(model, 0.1)
    return model


def _case(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name).items()}


@given(
    name=st.sampled_from(NAMES),
    chosen=st.lists(st.sampled_from(LINEAR), min_size=1, max_size=3),
)
def test_any_list_of_linear_methods_merges_in_its_order(name: str, chosen: list[Any]) -> None:
    model = spliced(name, chosen)
    case = _case(name, torch.float64)
    before = logits(model, case)
    base = build(name).to(torch.float64)
    merged = surgery.merge(model)
    torch.testing.assert_close(logits(model, case), before, rtol=1e-9, atol=1e-9)
    assert not hosts(model)
    assert not merged.left
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert list(model.state_dict()) == list(base.state_dict())
    merged.undo(model)
    pairs = zip(model.state_dict().values(), base.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_rounded_once(dtype: torch.dtype) -> None:
    """W' is the float64 sum of the stored tensors, rounded: nothing is lost in between."""
    model = spliced("llama", [("lora", {"rank": 2, "ports": ("query",), "alpha": 3.0})], dtype)
    attn = model.model.layers[0].self_attn
    update, weight = attn.lora_query, attn.q_proj.weight.detach().clone()
    product = update.b.double().T @ update.a.double()
    surgery.merge(model)
    assert torch.equal(attn.q_proj.weight, (weight.double() + 1.5 * product).to(dtype))


def test_bits_of_weights_that_no_method_names_stay() -> None:
    model, base = spliced("gpt2", [("lora", {"ports": ("value",)})]), build("gpt2").double()
    surgery.merge(model)
    ours, theirs = (m.transformer.h[0].attn.c_attn.weight for m in (model, base))
    assert torch.equal(ours[:, :64], theirs[:, :64])
    assert not torch.equal(ours[:, 64:], theirs[:, 64:])


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ([("prefix", {})], "'prefix' at .* not a linear map"),
        ([("ffn_adapter", {"rank": 2})], "'ffn_adapter' at .* not a linear map"),
        ([("inducer", {"value_rank": 2})], "'inducer' at .* only a part of its module is linear"),
        ([("lora", {"bias": True})], "'lora' at .* has no bias to fold the module's into"),
        (BEHIND, "cannot be merged"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_changes(chosen: Any, reason: str) -> None:
    model = spliced("llama", chosen)
    before, state = logits(model, inputs("llama")), copy.deepcopy(model.state_dict())
    with pytest.raises(surgery.SpliceError, match=reason):
        surgery.merge(model)
    assert torch.equal(logits(model, inputs("llama")), before)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_the_rest_stays_spliced_if_asked() -> None:
    model = spliced("gpt2", [("lora", {}), ("inducer", {"value_rank": 3}), ("prefix", {})])
    before = logits(model, inputs("gpt2"))
    merged = surgery.merge(model, partial=True)
    torch.testing.assert_close(logits(model, inputs("gpt2")), before, rtol=1e-9, atol=1e-9)
    assert "still spliced: inducer, prefix" in repr(merged)
    assert {i.method.name for i in merged.folded} == {"lora"}
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("value_b2"))
    with pytest.raises(surgery.SpliceError, match="partly merged"):
        surgery.save(model, "nowhere")


def test_what_stays_in_front_keeps_what_is_behind_it() -> None:
    """An adapter behind which a scale stands: scaling W would leave the adapter unscaled."""
    model = spliced("gpt2", BEHIND)
    before = logits(model, inputs("gpt2"))
    merged = surgery.merge(model, partial=True)
    torch.testing.assert_close(logits(model, inputs("gpt2")), before, rtol=1e-9, atol=1e-9)
    assert {i.edit.verb for i in merged.left} == {"add", "replace"}


def test_one_splice_of_two_is_merged() -> None:
    model = spliced("llama", [("lora", {"rank": 2})])
    surgery.splice(model, surgery.method("inducer", value_rank=2), name="second")
    perturb(model)
    before = logits(model, inputs("llama"))
    surgery.merge(model, "default")
    torch.testing.assert_close(logits(model, inputs("llama")), before, rtol=1e-9, atol=1e-9)
    assert [r.name for r in surgery.summary(model).reports] == ["second"]
    surgery.remove(model, "second")


def test_attention_of_torch_itself_merges() -> None:
    """Its projection is one parameter of three parts, used by a function."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).double().eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    methods = [surgery.method("lora", ports=("query", "value")), surgery.method("ssb")]
    surgery.splice(model, methods, example_inputs=x)
    perturb(model)
    before = model(x)
    surgery.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)


def test_a_merged_model_is_saved_as_any_other(tmp_path: Any) -> None:
    model = spliced("roberta", [("lora", {}), ("bitfit", {})], torch.float32)
    before = logits(model, inputs("roberta"))
    surgery.merge(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, inputs("roberta")), before, rtol=1e-5, atol=1e-6)


def test_merges_are_undone_from_the_last() -> None:
    model = built_with("gpt2", surgery.method("lora", rank=2), name="a")
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
