"""A host stays the object that it was: its type, keys and attributes, copied, pickled and saved."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

import surgery
from tests.support.models import NAMES, build, inputs, logits, perturb
from tests.support.splices import with_inducer_and_lora


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.few(3)
def test_deepcopy_and_pickle_keep_the_splice_and_are_independent(name: str, tmp_path: Path) -> None:
    model, case = with_inducer_and_lora(name), inputs(name)
    perturb(model)
    expected = logits(model, case)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, case), expected)
        perturb(twin, seed=9)
        assert not torch.equal(logits(twin, case), expected)
        surgery.remove(twin)
    assert torch.equal(logits(model, case), expected)


@pytest.mark.parametrize("name", NAMES)
def test_types_base_keys_and_attributes_stay(name: str) -> None:
    base, model = build(name), with_inducer_and_lora(name)
    keys = list(base.state_dict())
    assert [k for k in model.state_dict() if k in keys] == keys
    modules = dict(model.named_modules())
    for path, module in base.named_modules():
        assert isinstance(modules[path], type(module))
        assert type(modules[path]).__name__ == type(module).__name__
        own = {k for k in vars(module) if not k.startswith("_")}
        assert own <= set(vars(modules[path]))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "plain"])
def test_a_removed_model_saves_and_loads_as_before(name: str, tmp_path: Path) -> None:
    model = surgery.remove(with_inducer_and_lora(name))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again.eval(), inputs(name)), logits(build(name), inputs(name)))
