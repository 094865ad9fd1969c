"""Rows of tokens that belong to a splice are switched, routed, merged and removed with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from tests.support.models import build, inputs, logits, perturb
from tests.support.peft_cases import TOKENS as IDS
from tests.support.peft_cases import base
from tests.support.splices import untouched

TOKENS = (58, 57, 3)
METHOD = surgery.method("tokens", tokens=TOKENS)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "roberta"])
def test_only_their_rows_change_and_a_tied_head_with_them(kind: str) -> None:
    model, given = build(kind), inputs(kind)
    base = logits(model, given)
    report = surgery.splice(model, METHOD)
    assert torch.equal(logits(model, given), base)
    table = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    assert len(report.inserted) == (2 if tied else 1)
    perturb(model, 0.3)
    (deltas,) = [p for _, p in surgery.spliced_parameters(model)]
    twin = build(kind)
    with torch.no_grad():
        twin.get_input_embeddings().weight[sorted(TOKENS)] += deltas
    given["input_ids"][0, :3] = torch.tensor(TOKENS)
    assert not torch.allclose(logits(model, given), base)
    torch.testing.assert_close(logits(model, given), logits(twin, given), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_encoder_and_a_decoder_with_one_table_share_the_rows() -> None:
    model, given = base("t5"), {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    report = surgery.splice(model, METHOD, example_inputs=given)
    tables = {"encoder.embed_tokens", "decoder.embed_tokens"}
    assert {i.site.path for i in report.inserted} >= tables
    perturb(model, 0.3)
    (deltas,) = [p for _, p in surgery.spliced_parameters(model)]
    twin = base("t5")
    twin.shared.weight[sorted(TOKENS)] += deltas
    for changed in given:
        case = {name: x.clone() for name, x in given.items()}
        case[changed][0, 1] = TOKENS[0]
        torch.testing.assert_close(model(**case).logits, twin(**case).logits, rtol=1e-5, atol=1e-5)


def test_two_splices_have_rows_of_their_own(tmp_path: Path) -> None:
    model, given = build("gpt2"), inputs("gpt2", batch=3)
    given["input_ids"][:, 1] = 58
    base = logits(model, given)
    for name in ("a", "b"):
        surgery.splice(model, [surgery.method("lora", rank=2), METHOD], name=name)
    surgery.freeze_base(model)
    perturb(model, 0.3)
    alone = {}
    for name in ("a", "b"):
        with surgery.using(model, name):
            alone[name] = logits(model, given)
    with surgery.route(["a", None, "b"]):
        together = logits(model, given)
    for row, expected in enumerate([alone["a"], base, alone["b"]]):
        torch.testing.assert_close(together[row], expected[row], rtol=1e-5, atol=1e-6)
    with surgery.disabled(model):
        assert torch.equal(logits(model, given), base)
    surgery.save(model, tmp_path / "b", only="b")
    fresh = surgery.load(build("gpt2"), tmp_path / "b")
    assert torch.equal(logits(fresh, given), alone["b"])
    surgery.use(model, "a")
    with pytest.raises(surgery.SpliceError, match="untie"):
        surgery.merge(model, "a")
    merged = surgery.merge(model, "a", untie=True)
    torch.testing.assert_close(logits(model, given), alone["a"], rtol=1e-5, atol=1e-5)
    surgery.unmerge(model, merged)
    surgery.remove(model)
    assert torch.equal(logits(model, given), base)
    assert untouched(model)


def test_training_moves_them_alone() -> None:
    model, given = build("gpt2"), inputs("gpt2")
    table = model.get_input_embeddings().weight.detach().clone()
    surgery.splice(model, METHOD)
    surgery.freeze_base(model)
    given["input_ids"][0, :3] = torch.tensor(TOKENS)
    logits(model, given).square().sum().backward()
    (deltas,) = [p for _, p in surgery.spliced_parameters(model)]
    assert deltas.grad is not None
    assert deltas.grad.abs().sum(-1).gt(0).all()
    assert torch.equal(model.get_input_embeddings().weight, table)


def test_what_is_not_possible_is_said() -> None:
    with pytest.raises(surgery.MethodError, match="at least one"):
        surgery.method("tokens")
    with pytest.raises(surgery.MethodError, match="at least one"):
        surgery.method("tokens", tokens=(-1,))
    with pytest.raises(surgery.MethodError, match="below 60"):
        surgery.splice(build("gpt2"), surgery.method("tokens", tokens=(60,)))
    with pytest.raises(surgery.SiteError, match="modules="):
        surgery.splice(build("gpt2"), surgery.method("tokens", tokens=(1,), modules="nowhere"))
    with pytest.raises(surgery.SiteError, match="embedding"):
        surgery.splice(nn.Sequential(nn.Linear(4, 4)), METHOD, example_inputs=torch.ones(1, 4))
