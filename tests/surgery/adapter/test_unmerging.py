"""A merge and its inverse are the identity, to the bits: weights, splices, outputs, training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

import surgery
from surgery.host.state import hosts
from tests.support.models import NAMES, build, inputs, logits, perturb

LINEAR = [
    ("lora", {"rank": 2, "ports": ("query", "output", "up")}),
    ("ia3", {}),
    ("ssb", {}),
    ("inducer", {"value_rank": 2}),
    ("prefix", {}),
]


def spliced(name: str, *chosen: Any) -> Any:
    model = build(name).eval()
    for number, (method, options) in enumerate(chosen):
        surgery.splice(
            model, surgery.method(method, **options), example_inputs=inputs(name), name=f"s{number}"
        )
    perturb(model, 0.1)
    return model


@given(
    name=st.sampled_from(NAMES),
    chosen=st.lists(st.sampled_from(LINEAR), min_size=1, max_size=3, unique_by=lambda m: m[0]),
    one=st.booleans(),
)
def test_unmerging_is_the_inverse_of_merging(name: str, chosen: list[Any], one: bool) -> None:
    model, case = spliced(name, *chosen), inputs(name)
    before, state = logits(model, case), copy.deepcopy(model.state_dict())
    records = {n: [i.path for i in r.inserted] for n, r in surgery_reports(model).items()}
    where = list(hosts(model))
    merged = surgery.merge(model, "s0" if one else None, partial=True)
    torch.testing.assert_close(logits(model, case), before, rtol=1e-4, atol=1e-4)
    assert surgery.unmerge(model, merged) is model
    assert torch.equal(logits(model, case), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert {n: [i.path for i in r.inserted] for n, r in surgery_reports(model).items()} == records
    assert list(hosts(model)) == where
    surgery.remove(model)
    assert torch.equal(logits(model, case), logits(build(name).eval(), case))


def surgery_reports(model: nn.Module) -> Any:
    return {report.name: report for report in surgery.summary(model).reports}


def test_what_was_merged_trains_saves_and_switches_again(tmp_path: Path) -> None:
    model, case = spliced("llama", LINEAR[0]), inputs("llama")
    before = logits(model, case)
    surgery.unmerge(model, surgery.merge(model))
    model.train()
    logits(model, case).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in surgery.spliced_parameters(model))
    surgery.save(model.eval(), tmp_path)
    assert torch.equal(logits(surgery.load(build("llama").eval(), tmp_path), case), before)
    with surgery.disabled(model, "s0"):
        assert torch.equal(logits(model, case), logits(build("llama").eval(), case))


def test_torch_s_own_attention_unmerges_and_stays_alive() -> None:
    """Its projection is packed, and its fused path must stay closed again."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    weights = copy.deepcopy(model.state_dict())
    surgery.splice(model, surgery.method("lora", ports=("query", "value")), example_inputs=x)
    perturb(model)
    with torch.no_grad():
        before = model(x)
        merged = surgery.merge(model)
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
        surgery.unmerge(model, merged)
        assert torch.equal(model(x), before)
    surgery.remove(model)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_what_changed_meanwhile_is_named_and_nothing_changes() -> None:
    model, case = spliced("llama", LINEAR[0]), inputs("llama")
    merged = surgery.merge(model)
    surgery.splice(model, surgery.method("lora", ports=("value",)), name="later")
    now = logits(model, case)
    with pytest.raises(surgery.SpliceError, match="has changed since this merge"):
        surgery.unmerge(model, merged)
    assert torch.equal(logits(model, case), now)
    surgery.remove(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    with pytest.raises(surgery.SpliceError, match=r"q_proj\.weight has changed since"):
        surgery.unmerge(model, merged)


def test_an_interrupted_unmerge_leaves_the_merged_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, case = spliced("llama", LINEAR[0]), inputs("llama")
    merged = surgery.merge(model)
    now = logits(model, case)

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("surgery.splicer.reinsertion.settle_advance", fails)
    with pytest.raises(KeyboardInterrupt):
        surgery.unmerge(model, merged)
    assert torch.equal(logits(model, case), now)
    assert not hosts(model)
    monkeypatch.undo()
    surgery.unmerge(model, merged)


@pytest.mark.parametrize("where", ["embedding", "linear"])
def test_a_tied_weight_gets_a_copy_of_its_own_if_asked(where: str, tmp_path: Path) -> None:
    model, case = build("gpt2").eval(), inputs("gpt2")
    base, tied = logits(model, case), model.lm_head.weight
    port = {"embedding": "rows", "linear": "output"}[where]
    sites = getattr(surgery.locate(model), where)
    surgery.splice(model, surgery.method("lora", ports=(port,)), at=sites)
    perturb(model)
    tuned = logits(model, case)
    with pytest.raises(surgery.SpliceError, match="untie=True"):
        surgery.merge(model)
    merged = surgery.merge(model, untie=True)
    assert model.lm_head.weight is not model.transformer.wte.weight
    torch.testing.assert_close(logits(model, case), tuned, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, case), tuned, rtol=1e-5, atol=1e-5)
    surgery.unmerge(model, merged)
    assert model.lm_head.weight is tied
    assert model.transformer.wte.weight is tied
    assert model.config.tie_word_embeddings
    assert torch.equal(logits(model, case), tuned)
    surgery.remove(model)
    assert torch.equal(logits(model, case), base)


def test_both_ends_of_a_tie_are_merged() -> None:
    model, case = build("gpt2").eval(), inputs("gpt2")
    sites = surgery.locate(model)
    for name, port, at in (("in", "rows", sites.embedding), ("out", "output", sites.linear)):
        surgery.splice(model, surgery.method("lora", ports=(port,)), at=at, name=name + "_")
    perturb(model)
    tuned = logits(model, case)
    merged = surgery.merge(model, untie=True)
    torch.testing.assert_close(logits(model, case), tuned, rtol=1e-5, atol=1e-5)
    surgery.unmerge(model, merged)
    assert torch.equal(logits(model, case), tuned)
