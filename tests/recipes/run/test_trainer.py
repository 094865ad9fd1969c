"""The Trainer counts, validates, decays and keeps what it should."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from torch import nn

import surgery
from surgery.adapter.reading import read
from surgery.errors import RecipeError
from surgery_recipes.run import finetune
from surgery_recipes.run.prepare import prepare_run
from surgery_recipes.run.trainer import make_trainer, training_arguments
from tests.recipes import tiny
from tests.recipes.run.runs import QUIET, recipe, tensors


class Oracle(nn.Module):
    """Gives every example its own label."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
        logits = nn.functional.one_hot(labels, 2) + self.weight
        return {"loss": logits.sum() * 0, "logits": logits}


def test_answers_are_scored_with_their_own_examples(root: Path, tmp_path: Path) -> None:
    """Batches of training are grouped by length, but validation compares in order."""
    folder = tiny.save_data("sst2", tmp_path / "data", 40)
    plan = recipe("sst2/lora", root, tmp_path, f"data={folder}", "data.held_out=20")
    assert plan.training["train_sampling_strategy"] == "group_by_length"
    trainer = make_trainer(Oracle(), prepare_run(plan), training_arguments(plan))
    assert trainer.evaluate()["eval_accuracy"] == 1.0


def test_biases_do_not_decay(root: Path, tmp_path: Path) -> None:
    model, _ = tiny.prepared("sst2", root)
    plan = recipe("sst2/lora", root, tmp_path)
    base = tr.AutoModelForSequenceClassification.from_pretrained(model)
    biased = surgery.method("lora", bias=True)
    surgery.splice(base, [surgery.method("bitfit"), surgery.method("inducer"), biased])
    names = make_trainer(
        base, prepare_run(plan), training_arguments(plan)
    ).get_decay_parameter_names(base)
    ours = {
        name.rpartition(".")[2]
        for name in names
        if any(method in name for method in ("bitfit", "inducer", "lora"))
    }
    assert ours == {"key_w1", "key_w2", "value_w1", "value_w2", "a", "b"}


def test_the_best_checkpoint_is_kept_and_training_stops_early(root: Path, tmp_path: Path) -> None:
    """A falling loss that is to rise: the first validation is the best, the second stops."""
    rising = ["training.greater_is_better=true", "training.max_steps=12", "patience=1"]
    made = recipe("webnlg/lora", root, tmp_path / "run", *rising, "training.save_total_limit=1")
    rows = finetune.train(made, QUIET)
    assert rows[0].losses[-1][0] == 4
    best, kept = read(tmp_path / "run/checkpoints/checkpoint-2")[1], tensors(tmp_path / "run")
    assert all(torch.equal(kept[name], best[name]) for name in kept)


def test_tensorboard_logs_by_default_where_it_is_installed(root: Path, tmp_path: Path) -> None:
    made = recipe("sst2/lora", root, tmp_path / "run")
    del made.training["report_to"]
    finetune.train(made, QUIET)
    there = importlib.util.find_spec("tensorboard") is not None
    assert bool(list((tmp_path / "run").rglob("events.out.tfevents*"))) == there


def test_wandb_is_missed_by_name(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe("sst2/lora", root, tmp_path / "run")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install wandb"):
        finetune.train(made, QUIET, finetune.RunOptions(wandb=True))


@pytest.mark.parametrize("name", ["sst2/lora", "webnlg/lora"])
@pytest.mark.few(1)
def test_accumulated_gradients_are_those_of_one_batch(
    name: str, root: Path, tmp_path: Path
) -> None:
    """Losses and adapters of 4 x 1 and 2 x 2 agree: nothing is counted twice."""
    task, dry = name.partition("/")[0], tmp_path / "model"
    shutil.copytree(tiny.prepared(task, root)[0], dry)
    config = json.loads((dry / "config.json").read_text())
    drops = [key for key in config if "dropout" in key or key.endswith("pdrop")]
    (dry / "config.json").write_text(json.dumps({**config, **dict.fromkeys(drops, 0.0)}))
    found = []
    for size, steps in ((4, 1), (2, 2)):
        own = [f"training.per_device_train_batch_size={size}", "training.warmup_steps=0"]
        own += [f"training.gradient_accumulation_steps={steps}", f"model={dry}"]
        made = recipe(name, root, tmp_path / str(size), *own)
        made.splice[0]["dropout"] = 0.0
        made.training["train_sampling_strategy"] = "random"
        [row] = finetune.train(made, QUIET)
        found.append(([loss for _, loss in row.losses], tensors(tmp_path / str(size))))
    (one, first), (two, second) = found
    assert one == pytest.approx(two, rel=1e-3)
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key], rtol=1e-2, atol=2e-4)
