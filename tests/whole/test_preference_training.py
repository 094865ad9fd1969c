"""Preference training with TRL: the reference is the model itself, with other splices on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from tests.support.models import build, perturb

pytestmark = [pytest.mark.cases, pytest.mark.filterwarnings("ignore")]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(50))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.mark.parametrize("reference", ["copy", []])
def test_dpo_goes_on_from_an_adapter(reference: Any, tmp_path: Path) -> None:
    """Its first loss is log 2 where the reference is a copy of the adapter."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = build("llama")
    surgery.splice(model, surgery.method("lora", rank=4), name="policy")
    perturb(model, 0.3)
    surgery.copy(model, "policy", "copy")
    surgery.freeze_base(model, train="policy")
    numbers = sum(p.numel() for p in model.parameters())
    rows = [
        {"prompt": "w1 w2", "chosen": f" w{i} w4", "rejected": f" w5 w{i}"} for i in range(6, 14)
    ]
    arguments = DPOConfig(
        str(tmp_path), max_steps=2, logging_steps=1, learning_rate=1e-2, report_to=[],
        per_device_train_batch_size=8, use_cpu=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    trainer = DPOTrainer(
        model,
        ref_model=surgery.view(model, reference),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    frozen = {n: p.clone() for n, p in surgery.spliced_parameters(model, "copy")}
    trainer.train()
    first, second = (row["loss"] for row in trainer.state.log_history[:2])
    assert (abs(first - math.log(2)) < 1e-6) is (reference == "copy")
    assert second < first
    assert all(torch.equal(p, frozen[n]) for n, p in surgery.spliced_parameters(model, "copy"))
    assert {id(p) for p in trainer.ref_model.parameters()} == {id(p) for p in model.parameters()}
    assert sum(p.numel() for p in model.parameters()) == numbers
