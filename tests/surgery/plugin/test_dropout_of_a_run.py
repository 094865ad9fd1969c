"""Adapter dropout over the steps of a run: seeds, resumed runs, and what sets it for a model."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import surgery
from tests.support.models import gpt2_small

SIZES = {"vocab_size": 30, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 4}


def spliced(**options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = gpt2_small(**SIZES, bos_token_id=0, eos_token_id=2, **options).train()
    surgery.splice(model, surgery.method("lora", dropout=0.5))
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.normal_(std=0.3)
    return model


NO_DRAW = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


@pytest.mark.parametrize("options", [{}, NO_DRAW])
def test_one_seed_is_one_run_and_steps_differ(options: dict[str, float]) -> None:
    model, ids = spliced(**options), torch.arange(10).reshape(2, 5)

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        return [model(input_ids=ids).logits for _ in range(3)]

    first, again = run(), run()
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    state = torch.get_rng_state()
    model(input_ids=ids)
    later = model(input_ids=ids).logits
    other = copy.deepcopy(model)  # a resumed run: another process, the same random state
    torch.set_rng_state(state)
    other(input_ids=ids)
    assert torch.equal(other(input_ids=ids).logits, later)


def test_what_sets_all_dropouts_reaches_those_of_adapters() -> None:
    model, ids = spliced(**NO_DRAW), torch.arange(10).reshape(2, 5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(model(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_nothing_stays_on_the_model_when_adapter_dropout_goes() -> None:
    model = spliced()
    assert model._forward_hooks
    surgery.remove(model)
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called


def test_a_run_resumed_by_trainer_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(80).reshape(16, 5) % 9]

    def run(steps: int, resume: bool = False) -> dict[str, Tensor]:
        model = spliced(**NO_DRAW)
        surgery.freeze_base(model)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=6, save_steps=3, per_device_train_batch_size=4,
            learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        if steps < 6:
            trainer.add_callback(StopAt(steps))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        return dict(surgery.spliced_parameters(model))

    whole = run(6)
    shutil.rmtree(tmp_path)
    run(3)
    torch.rand(7)  # another process, another random state
    resumed = run(6, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = dict(surgery.spliced_parameters(spliced(**NO_DRAW)))
    assert not any(torch.equal(whole[name], start[name]) for name in whole)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step
