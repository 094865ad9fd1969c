"""Splices are switched off and removed one by one; a name that is taken or unknown is refused."""

from __future__ import annotations

import pytest
import torch

import surgery
from surgery.errors import SpliceError
from surgery.splicer.record import reports
from tests.support.models import build, inputs, logits, perturb


def test_a_name_used_twice() -> None:
    model = build("gpt2")
    surgery.splice(model, surgery.method("lora"))
    with pytest.raises(surgery.SpliceError, match="already spliced under the name 'default'"):
        surgery.splice(model, surgery.method("lora"))
    assert len(reports(model)) == 1


def test_what_is_not_there_cannot_be_removed_disabled_or_frozen() -> None:
    model = build("gpt2")
    for call in (surgery.remove, surgery.freeze_base, lambda m: surgery.save(m, "nowhere")):
        with pytest.raises(surgery.SpliceError, match="nothing is spliced"):
            call(model)
    surgery.splice(model, surgery.method("lora"), name="mine")
    with pytest.raises(surgery.SpliceError, match="Did you mean 'mine'"):
        surgery.remove(model, "mien")
    with pytest.raises(surgery.SpliceError, match="keep='lm_haed'"):
        surgery.freeze_base(model, keep=["lm_haed"])


def test_two_splices_are_switched_and_removed_apart() -> None:
    model, case = build("llama"), inputs("llama")
    base = logits(model, case)
    surgery.splice(model, surgery.method("lora"))
    perturb(model)
    first = logits(model, case)
    surgery.splice(model, surgery.method("inducer", key_rank=2, value_rank=2), name="second")
    assert torch.equal(logits(model, case), first)
    perturb(model, seed=8)
    assert not torch.equal(logits(model, case), first)
    with surgery.disabled(model):
        assert torch.equal(logits(model, case), base)
    surgery.remove(model, "default")
    with surgery.disabled(model, "second"):
        assert torch.equal(logits(model, case), base)
    surgery.remove(model, "second")
    assert torch.equal(logits(model, case), base)


def test_a_splice_that_only_a_part_knows_of_is_in_the_way() -> None:
    model = build("gpt2")
    x = inputs("gpt2")
    surgery.splice(model.transformer, surgery.method("lora"), example_inputs=x)
    for name in ("default", "second"):  # it would neither train nor save the first
        with pytest.raises(SpliceError, match="already spliced under the name 'default'"):
            surgery.splice(model, surgery.method("inducer"), name=name)
    assert surgery.summary(model.transformer).inserted
    surgery.remove(model.transformer)
    surgery.splice(model, surgery.method("inducer"), name="second")
