"""Preference training with TRL: the reference is the model itself, with other splices on.

A trainer that is given no reference gets the model as it was given: no second base is loaded. The
models here were loaded from nowhere, so a trainer that loads one raises an error.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.splicer import reports
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


def policy(**options: Any) -> Any:
    """Return a model with an adapter as supervised fine-tuning leaves it."""
    model = build("llama")
    surgery.splice(model, surgery.method("lora", rank=4), name="policy")
    perturb(model, 0.3)
    surgery.freeze_base(model, **options)
    return model


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2,
        "report_to": [], "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False,
        "save_strategy": "no", **more,
    }  # fmt: skip


PAIRS = [{"prompt": "w1 w2", "chosen": f" w{i} w4", "rejected": f" w5 w{i}"} for i in range(6, 14)]


def dpo(model: Any, folder: Path, **more: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model,
        args=DPOConfig(**settings(folder, **more)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer(),
    )


def shares_base(reference: Any, model: Any) -> bool:
    """Whether a reference takes the memory of an adapter, and leaves the model's splices alone."""
    own = {id(p) for _, p in surgery.spliced_parameters(model)}
    base = {id(p) for p in model.parameters()} - own
    theirs = {id(p) for p in reference.parameters()}
    alone = not own & theirs and not any(p.requires_grad for p in reference.parameters())
    return alone and base == theirs & {id(p) for p in model.parameters()}


def test_dpo_compares_with_the_adapter_that_it_was_given(
    tmp_path: Path,
) -> None:
    model = policy()
    trainer = dpo(model, tmp_path)
    before = trainer.ref_model(torch.arange(3, 11)[None]).logits
    trainer.train()
    first, second = (row["loss"] for row in trainer.state.log_history[:2])
    assert abs(first - math.log(2)) < 1e-6
    assert second < first
    assert torch.equal(trainer.ref_model(torch.arange(3, 11)[None]).logits, before)
    assert not torch.equal(model(torch.arange(3, 11)[None]).logits, before)
    assert shares_base(trainer.ref_model, model)


def test_a_checkpoint_of_dpo_holds_the_policy_alone(tmp_path: Path) -> None:
    model = policy()
    dpo(model, tmp_path, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "checkpoint-2"
    assert [s.name for s in surgery.inspect(folder).splices] == ["policy"]
    base = build("llama")
    surgery.load(base, folder)
    ids = torch.arange(3, 11)[None]
    assert torch.equal(base(ids).logits, model(ids).logits)
    again = policy()
    dpo(again, tmp_path, save_strategy="steps").train(
        resume_from_checkpoint=f"{tmp_path}/checkpoint-1"
    )
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_what_is_trained_or_written_to_is_not_shared(tmp_path: Path) -> None:
    model = policy(keep=["lm_head"])
    head = dpo(model, tmp_path).ref_model
    assert head.lm_head.weight is not model.lm_head.weight
    assert head.model.embed_tokens.weight is model.model.embed_tokens.weight
    synchronised = dpo(policy(), tmp_path, sync_ref_model=True, ref_model_sync_steps=1)
    reference = synchronised.ref_model
    own = {id(p) for p in synchronised.model.parameters()}
    assert not own & {id(p) for p in reference.parameters()}
    start = reference(torch.arange(3, 11)[None]).logits
    synchronised.train()
    assert not torch.equal(reference(torch.arange(3, 11)[None]).logits, start)


def test_two_stages_and_two_splices_start_from_what_was_given(tmp_path: Path) -> None:
    model = build("llama")
    surgery.splice(model, surgery.method("ia3"), name="a")
    surgery.splice(model, surgery.method("lora", rank=4), name="b")
    perturb(model, 0.3)
    for trained in ("a", "b"):
        surgery.freeze_base(model, train=trained)
        trainer = dpo(model, tmp_path)
        trainer.train()
        assert abs(trainer.state.log_history[0]["loss"] - math.log(2)) < 1e-6
    assert list(reports(model)) == ["a", "b"]


def test_a_reference_has_no_dropout(tmp_path: Path) -> None:
    model = build("llama")
    surgery.splice(model, surgery.method("lora", rank=4, dropout=0.5))
    perturb(model, 0.3)
    surgery.freeze_base(model)
    reference = dpo(model, tmp_path, disable_dropout=False).ref_model
    model.train()
    ids = torch.arange(3, 11)[None]
    assert torch.equal(reference(ids).logits, reference(ids).logits)
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_online_trainers_compare_with_the_adapter_that_they_were_given(
    name: str, tmp_path: Path
) -> None:
    """The divergence from the reference is zero at the first step, and not at the second."""
    import trl
    from datasets import Dataset

    model = policy()
    options = settings(tmp_path, beta=0.1, num_generations=4, max_completion_length=4)
    trainer = getattr(trl, f"{name}Trainer")(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(c.split()))) for c in completions],
        args=getattr(trl, f"{name}Config")(**options),
        train_dataset=Dataset.from_list([{"prompt": "w1 w2"}] * 8),
        processing_class=tokenizer(),
    )
    trainer.train()
    first, second = (row["kl"] for row in trainer.state.log_history[:2])
    assert abs(first) < 1e-6 < abs(second)
    assert shares_base(trainer.ref_model, model)


def test_kto_without_a_reference_starts_without_a_difference(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": "w1 w2", "completion": f" w{i} w4", "label": i % 2 == 0} for i in range(6, 14)
    ]
    model = policy()
    trainer = KTOTrainer(
        model,
        args=KTOConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - 0.5) < 1e-6
    assert shares_base(trainer.ref_model, model)
