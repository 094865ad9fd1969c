"""copy and rename leave what a model computes as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgery
from tests.support.models import build, inputs, logits, perturb
from tests.support.splices import untouched

IDS = inputs("llama")
METHODS = [
    surgery.method("lora", rank=2, ports="all"),
    surgery.method("prefix", length=3, share="global"),  # its layers share a module
    surgery.method("inducer", key_rank=2, value_rank=2),  # it reads projections of the base
    surgery.method("prompt", length=2),
]


def test_a_copy_is_off_and_frozen_and_has_the_same_values() -> None:
    model = build("llama")
    surgery.splice(model, METHODS, name="policy")
    surgery.freeze_base(model)
    perturb(model)
    before = logits(model, IDS)
    surgery.copy(model, "policy", "reference")
    assert torch.equal(logits(model, IDS), before)
    assert not any(p.requires_grad for _, p in surgery.spliced_parameters(model, "reference"))
    perturb(model, seed=5)
    count = len(list(surgery.spliced_parameters(model, "policy")))
    for _, parameter in list(surgery.spliced_parameters(model, "policy"))[:count]:
        torch.nn.init.normal_(parameter)
    moved = logits(model, IDS)
    assert not torch.equal(moved, before)


def test_a_copy_keeps_its_values_while_the_first_is_trained() -> None:
    model = build("llama")
    surgery.splice(model, METHODS, name="policy")
    perturb(model)
    before = logits(model, IDS)
    surgery.copy(model, "policy", "reference")
    for _, parameter in surgery.spliced_parameters(model, "policy"):
        torch.nn.init.normal_(parameter)
    assert not torch.equal(logits(model, IDS), before)
    with surgery.using(model, "reference"):
        assert torch.equal(logits(model, IDS), before)
    surgery.remove(model, "policy")
    surgery.use(model)
    assert torch.equal(logits(model, IDS), before)
    surgery.remove(model)
    assert untouched(model)


def test_a_copy_is_saved_and_loaded_like_any_other(tmp_path: object) -> None:
    model = build("llama")
    surgery.splice(model, METHODS, name="one")
    perturb(model)
    before = logits(model, IDS)
    surgery.copy(model, "one", "two-2")
    surgery.save(model, f"{tmp_path}/two", only="two-2")
    fresh = build("llama")
    surgery.load(fresh, f"{tmp_path}/two", name="three")
    assert torch.equal(logits(fresh, IDS), before)


def test_a_renamed_splice_stays_on_or_off_and_in_its_place() -> None:
    model = build("llama")
    for name in "abc":
        surgery.splice(model, surgery.method("lora", rank=2), name=name)
    perturb(model)
    surgery.use(model, ["a", "b"])
    before = logits(model, IDS)
    surgery.rename(model, "a", "x-1")
    surgery.rename(model, "c", "y")
    assert torch.equal(logits(model, IDS), before)
    assert list(surgery.summary(model).states) == ["x-1", "b", "y"]
    surgery.splice(model, surgery.method("lora", rank=2), name="a")
    surgery.remove(model, "x-1")
    with pytest.raises(surgery.SpliceError, match="nothing named 'x-1'"):
        surgery.use(model, "x-1")


@pytest.mark.parametrize("name", ["a b", "a.b", "", "a/b", "x" * 101, 7, "b", "ﬁne"])
def test_a_bad_or_taken_name_is_refused(name: str) -> None:
    model = build("llama")
    for each in "ab":
        surgery.splice(model, surgery.method("lora", rank=2), name=each)
    for act in (surgery.copy, surgery.rename):
        with pytest.raises(surgery.SpliceError):
            act(model, "a", name)
    with pytest.raises(surgery.SpliceError):
        surgery.splice(model, surgery.method("lora", rank=2), name=name)
    assert list(surgery.summary(model).states) == ["a", "b"]


def test_splices_that_have_swapped_names_are_saved_and_loaded_in_their_order(
    tmp_path: Path,
) -> None:
    model = build("llama")
    for name, method in zip("ab", ("ia3", "lora"), strict=True):
        surgery.splice(model, [surgery.method(method), surgery.method("lora", rank=2)], name=name)
    perturb(model, 0.3)
    expected = logits(model, IDS)
    for name, new in (("a", "c"), ("b", "a"), ("c", "b")):
        surgery.rename(model, name, new)
    surgery.save(model, tmp_path, only=["a", "b"])
    fresh = build("llama")
    surgery.load(fresh, tmp_path)
    assert list(surgery.summary(fresh).states) == ["b", "a"]
    assert torch.equal(logits(fresh, IDS), expected)
    with pytest.raises(surgery.SpliceError, match="names no splice"):
        surgery.save(model, tmp_path, only=[])
