"""Checkpoints of the stock Trainer hold the adapter: saved, resumed, chosen and loaded."""

from __future__ import annotations

import copy
import gc
import json
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import surgery
from tests.support.models import build, gpt2_small, inputs, logits, perturb

ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.arange(80).reshape(16, 5) % 9]
METHODS = [surgery.method("lora", rank=2, dropout=0.1), surgery.method("prefix", length=3)]


def spliced(rows: bool = True) -> Any:
    torch.manual_seed(0)
    model = gpt2_small(vocab_size=30, n_positions=12, n_embd=16, n_layer=2, n_head=4).train()
    surgery.splice(model, METHODS)
    surgery.freeze_base(model, keep=["transformer.ln_f"])
    if rows:
        surgery.train_rows(model, "transformer.wte.weight", [3, 5])
    return model


class Stop(TrainerCallback):
    """Ends a run after three steps, as a machine that goes away."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 3


def trainer_of(model: Any, folder: Path, **options: Any) -> Trainer:
    given = {
        "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.05,
        "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    made = TrainingArguments(str(folder), **{**given, **options})
    return Trainer(model, made, train_dataset=ROWS, eval_dataset=ROWS[:4])


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_resumed_run_ends_in_the_bits_of_the_unbroken_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = spliced()
    base = state(whole)
    trainer_of(whole, tmp_path / "whole").train()
    cut = trainer_of(spliced(), tmp_path / "cut")
    cut.add_callback(Stop)
    cut.train()
    again = spliced()
    with caplog.at_level(logging.WARNING):
        trainer_of(again, tmp_path / "cut").train(resume_from_checkpoint=True)
    assert not [r for r in caplog.records if "keys" in r.getMessage()]
    for name, tensor in state(whole).items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not torch.equal(
        base["transformer.wte.weight"][3], state(again)["transformer.wte.weight"][3]
    )


def test_a_checkpoint_holds_the_adapter_and_is_loaded_by_load(tmp_path: Path) -> None:
    model = spliced()
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-6"
    (tensors,) = checkpoint.glob("*.safetensors")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert tensors.stat().st_size < 4 * trained + 10_000
    assert not list(checkpoint.glob("pytorch_model*"))
    torch.manual_seed(0)
    base = gpt2_small(vocab_size=30, n_positions=12, n_embd=16, n_layer=2, n_head=4)
    again = surgery.load(base, checkpoint, keep=["transformer.ln_f"]).eval()
    given = {"input_ids": ROWS[0]["input_ids"][None]}
    assert torch.equal(logits(again, given), logits(model.eval(), given))
    trainer.save_model(str(tmp_path / "end"))
    assert (tmp_path / "end/surgery.json").exists()


def test_the_best_checkpoint_is_put_back(tmp_path: Path) -> None:
    seen: dict[str, dict[str, Tensor]] = {}

    class Note(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen[f"checkpoint-{state.global_step}"] = {
                n: t.clone() for n, t in model.state_dict().items()
            }

    model = spliced()
    trainer = trainer_of(
        model, tmp_path, max_steps=8, save_steps=2, eval_steps=2, eval_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.add_callback(Note)
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint)).name
    assert best == "checkpoint-2"  # of the highest loss: the model has moved on since
    assert all(torch.equal(t, seen[best][n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("choice", [AutoModelForCausalLM, GPT2LMHeadModel])
def test_from_pretrained_of_a_checkpoint_says_what_to_call(choice: Any, tmp_path: Path) -> None:
    model = spliced()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"then call surgery\.load"):
        choice.from_pretrained(tmp_path)
    with pytest.raises((ValueError, KeyError)):  # and never random weights
        choice.from_pretrained(tmp_path, config=model.config)


def test_other_adapters_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    spliced().save_pretrained(tmp_path / "checkpoint-3")
    trainer_of(spliced(), tmp_path).train()
    other = gpt2_small(vocab_size=30, n_positions=12, n_embd=16, n_layer=2, n_head=4)
    surgery.splice(other, surgery.method("lora", rank=4))
    surgery.freeze_base(other)
    before = state(other)
    with pytest.raises(surgery.StoreError, match="checkpoint"):
        trainer_of(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert all(torch.equal(t, before[n]) for n, t in state(other).items())


def test_the_whole_model_is_saved_where_more_is_trained(tmp_path: Path) -> None:
    model = spliced()
    model.transformer.wpe.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"wpe.weight of the base requires a gradient"):
        model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole/surgery.json").exists()
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(again.transformer.wpe.weight, model.transformer.wpe.weight)
    model.transformer.wpe.weight.requires_grad_(False)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/surgery.json").exists()


@pytest.mark.parametrize("end", [surgery.remove, surgery.merge])
def test_a_model_without_splices_saves_itself_as_before(end: Any, tmp_path: Path) -> None:
    model = build("gpt2")
    hooks = len(model._load_state_dict_pre_hooks)
    surgery.splice(model, surgery.method("lora"))
    surgery.freeze_base(model)
    surgery.freeze_base(model)  # once more: still one hook
    perturb(model)
    end(model)
    assert "save_pretrained" not in vars(model)
    assert len(model._load_state_dict_pre_hooks) == hooks
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, inputs("gpt2")), logits(model.eval(), inputs("gpt2")))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_saves_itself(copied: Any, tmp_path: Path) -> None:
    model = spliced()
    other = copied(model)
    perturb(other)
    other.save_pretrained(tmp_path)
    fresh = spliced()
    fresh.save_pretrained(tmp_path / "fresh")
    assert (
        json.loads((tmp_path / "surgery.json").read_text())["sha256"]
        != json.loads((tmp_path / "fresh/surgery.json").read_text())["sha256"]
    )
    surgery.restore(fresh, tmp_path)
    assert all(torch.equal(t, fresh.state_dict()[n]) for n, t in state(other).items())
    surgery.remove(other)
    assert "save_pretrained" in vars(model)


def test_a_model_goes_with_its_last_user() -> None:
    model = spliced(rows=False)
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_checkpoint_that_lacks_a_trained_splice_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    surgery.splice(model, surgery.method("lora", rank=2), name="a")
    surgery.freeze_base(model)
    model.save_pretrained(tmp_path / "a")
    surgery.splice(model, surgery.method("lora", rank=2), name="b")
    surgery.freeze_base(model)
    tensors = load_file(next((tmp_path / "a").glob("*.safetensors")))
    with pytest.raises(surgery.StoreError, match="lacks the tensors"):
        model.load_state_dict(tensors, strict=False)
    surgery.use(model, "a")
    surgery.freeze_base(model, train="a")  # b is off and frozen, as a reference is
    model.load_state_dict(tensors, strict=False)
    surgery.restore(model, tmp_path / "a")
