"""Tests of what is trained: what was inserted, single rows, a fresh head."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from tests.support.models import build, inputs, logits
from tests.support.splices import inducer_and_lora


def test_the_trainer_trains_only_what_was_inserted(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    model = build("gpt2")
    surgery.splice(model, inducer_and_lora()[:2])
    surgery.freeze_base(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = inputs("gpt2", 8, 6)["input_ids"].tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train()
    inserted = dict(surgery.spliced_parameters(model))
    for key, value in model.state_dict().items():
        if key not in inserted:
            assert torch.equal(value, before[key]), key
    assert any(not torch.equal(p, before[k]) for k, p in inserted.items())


def test_an_empty_choice_trains_nothing() -> None:
    model = build("llama")
    surgery.splice(model, surgery.method("lora"))
    surgery.freeze_base(model, train=[])
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


def test_a_fresh_head_is_kept_and_said_so(tmp_path: Path) -> None:
    import transformers as tr

    build("bert").save_pretrained(tmp_path)
    model = tr.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    surgery.splice(model, surgery.method("lora"))
    frozen = surgery.freeze_base(model)
    assert "classifier.weight" in frozen.fresh
    assert "no weights were loaded for them" in repr(frozen)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias"} <= trainable
    assert not any("embeddings" in n for n in trainable)


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


def rows_with_gradient(model: nn.Module, x: Any) -> int:
    model.zero_grad()
    logits(model, x).sum().backward()
    gradient = model.transformer.wte.weight.grad
    return 0 if gradient is None else int((gradient != 0).any(-1).sum())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_trains_the_same_rows(way: Any) -> None:
    x, model = inputs("gpt2"), build("gpt2")
    surgery.splice(model, surgery.method("lora"))
    surgery.freeze_base(model)
    surgery.train_rows(model, "transformer.wte.weight", [7])
    copied = way(model)
    assert rows_with_gradient(model, x) == rows_with_gradient(copied, x) == 1
    surgery.train_rows(copied, "transformer.wte.weight", [7, 8])
    assert (rows_with_gradient(model, x), rows_with_gradient(copied, x)) == (1, 2)


def test_rows_are_forgotten_with_what_they_went_with() -> None:
    x, model = inputs("gpt2"), build("gpt2")
    surgery.splice(model, surgery.method("lora"))
    surgery.train_rows(model, "transformer.wte.weight", [7])
    surgery.freeze_base(model, keep=["transformer.wte"])
    assert rows_with_gradient(model, x) > 1
    surgery.train_rows(model, "transformer.wte.weight", [7])
    surgery.remove(model)
    model.requires_grad_(True)
    assert rows_with_gradient(model, x) > 1


def test_merging_the_last_splice_forgets_rows_too() -> None:
    x, model = inputs("gpt2"), build("gpt2")
    surgery.splice(model, surgery.method("lora"))
    surgery.freeze_base(model)
    surgery.train_rows(model, "transformer.wte.weight", [7])
    surgery.merge(model)
    model.requires_grad_(True)
    assert rows_with_gradient(model, x) > 1


def test_freezing_says_which_rows_it_forgot() -> None:
    model = build("gpt2")
    surgery.splice(model, surgery.method("lora"))
    surgery.train_rows(model, "transformer.wte.weight", [7])
    shown = repr(surgery.freeze_base(model))
    assert "train_rows was reset for transformer.wte.weight; call surgery.train_rows again" in shown
