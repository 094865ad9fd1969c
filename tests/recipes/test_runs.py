"""Runs: what is in the folder, going on with one, stopping one, and two processes for one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import surgery
from surgery.adapter.files import read
from surgery.cli import app
from surgery.errors import RecipeError
from surgery_recipes import finetune, results
from surgery_recipes.prepare import prepare
from surgery_recipes.recipe import Recipe, read_recipe
from surgery_recipes.shipped import find
from surgery_recipes.trainer import AdapterTrainer, arguments, make_trainer
from tests.recipes import tiny

KINDS = ["webnlg/mam_inducer", "coqa/fine_tuning", "coqa/prefix", "mnli/lora", "sst2/bitfit"]
QUIET = Console(quiet=True)


def recipe(name: str, root: Path, output: Path, *more: str) -> Recipe:
    task = name.split("/")[0]
    model, data = tiny.prepared(task, root)
    return read_recipe(find(name), [*tiny.overrides(task, model, data, output), *more])


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return read(run / "adapter")[1]


@pytest.mark.parametrize("name", KINDS)
def test_a_run_leaves_its_results_and_is_scored_again_from_its_files(
    name: str, root: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rows = finetune.train(recipe(name, root, run), QUIET)
    kept = "model" if name.endswith("fine_tuning") else "adapter"
    files = {"recipe.yaml", kept, "metrics.json", "loss.png", "samples.html", "answers.jsonl"}
    assert files <= {path.name for path in run.iterdir()}
    written = json.loads((run / "metrics.json").read_text())
    assert written["rows"][0]["scores"] == rows[0].scores
    assert [step for step, _ in rows[0].losses] == [1, 2, 3, 4]
    task = surgery.tasks()[name.split("/")[0]]
    assert rows[0].score == rows[0].scores[task.metric]
    assert finetune.evaluate(run, QUIET) == rows[0].scores


def test_a_finished_run_is_not_written_over_unasked(root: Path, tmp_path: Path) -> None:
    made = recipe("sst2/lora", root, tmp_path / "run")
    first = finetune.train(made, QUIET)
    with pytest.raises(RecipeError, match="holds the results of a finished run"):
        finetune.train(made, QUIET)
    assert finetune.train(made, QUIET, finetune.Run(overwrite=True))[0].losses == first[0].losses


def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(root: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    dropping = ["training.load_best_model_at_end=false", "patience=0"]
    finetune.train(recipe("webnlg/inducer_lora", root, whole, *dropping), QUIET)
    made = recipe("webnlg/inducer_lora", root, broken, *dropping)
    stop_at(3, made)
    state = broken / "checkpoints/checkpoint-2/trainer_state.json"
    content = json.loads(state.read_text())
    clock = content["stateful_callbacks"]["Clock"]["args"]
    assert 0 < clock["before"] < 100
    clock["before"] += 100
    state.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match=r"holds an unfinished run\. Go on with --resume"):
        finetune.train(made, QUIET)
    finetune.train(made, QUIET, finetune.Run(resume=True))
    one, two = tensors(whole), tensors(broken)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    size = sum(f.stat().st_size for f in (whole / "checkpoints/checkpoint-4").glob("*.safetensors"))
    assert size == sum(f.stat().st_size for f in (whole / "adapter").glob("*.safetensors"))
    row = json.loads((broken / "metrics.json").read_text())["rows"][0]
    assert row["seconds"] > 100  # the seconds before the interruption count


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
    trainer = make_trainer(Oracle(), prepare(plan), arguments(plan))
    assert trainer.evaluate()["eval_accuracy"] == 1.0


def test_biases_do_not_decay(root: Path, tmp_path: Path) -> None:
    model, _ = tiny.prepared("sst2", root)
    plan = recipe("sst2/lora", root, tmp_path)
    base = tr.AutoModelForSequenceClassification.from_pretrained(model)
    biased = surgery.method("lora", bias=True)
    surgery.splice(base, [surgery.method("bitfit"), surgery.method("inducer"), biased])
    names = make_trainer(base, prepare(plan), arguments(plan)).get_decay_parameter_names(base)
    ours = {
        name.rpartition(".")[2]
        for name in names
        if any(method in name for method in ("bitfit", "inducer", "lora"))
    }
    assert ours == {"key_w1", "key_w2", "value_w1", "value_w2", "a", "b"}


def test_the_command_line_shows_a_bar_with_the_loss(root: Path, tmp_path: Path) -> None:
    model, data = tiny.prepared("sst2", root)
    words = [w for w in tiny.overrides("sst2", model, data, tmp_path / "run") if "tqdm" not in w]
    shown = CliRunner().invoke(app, ["train", "sst2/lora", *words])
    assert shown.exit_code == 0, shown.output
    assert re.search(r"4/4 \[.*loss=\d", shown.stderr)


def stop_at(step: int, made: Recipe, console: Console = QUIET) -> None:
    """Train until Ctrl-C is pressed at a step."""

    class Press(tr.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    patch = pytest.MonkeyPatch()
    patch.setattr(AdapterTrainer, "create_optimizer", pressing(AdapterTrainer, Press()))
    try:
        with pytest.raises(KeyboardInterrupt):
            finetune.train(made, console)
    finally:
        patch.undo()


def pressing(cls: Any, callback: Any) -> Any:
    original = cls.create_optimizer

    def create_optimizer(self: Any, *args: Any) -> Any:
        self.add_callback(callback)
        return original(self, *args)

    return create_optimizer


def test_ctrl_c_saves_what_was_learnt_and_says_where(root: Path, tmp_path: Path) -> None:
    console = Console(record=True, file=open(os.devnull, "w"), width=300)  # noqa: SIM115
    made = recipe("sst2/inducer", root, tmp_path / "run")
    stop_at(3, made, console)
    console.file.close()
    assert f"interrupted at step 3: what was learnt is in {tmp_path}" in console.export_text()
    assert any(tensor.abs().sum() > 0 for tensor in tensors(tmp_path / "run").values())
    assert not (tmp_path / "run/metrics.json").exists()


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
        finetune.train(made, QUIET, finetune.Run(wandb=True))


def test_the_command_line_tries_a_recipe_out_and_trains_it(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model, data = tiny.prepared("webnlg", root)
    words = ["webnlg/inducer", *tiny.overrides("webnlg", model, data, run)]
    runner = CliRunner()
    tried = runner.invoke(app, ["train", *words, "--dry-run"])
    assert tried.exit_code == 0, tried.output
    assert "16 examples" in tried.output
    assert not run.exists()
    trained = runner.invoke(app, ["train", *words])
    assert trained.exit_code == 0, trained.output
    assert "score it again with" in trained.output
    again = runner.invoke(app, ["train", *words])
    assert again.exit_code == 1
    assert "--overwrite" in again.output
    scored = runner.invoke(app, ["eval", str(run)])
    assert scored.exit_code == 0, scored.output


@pytest.mark.parametrize("name", ["sst2/mam_inducer", "webnlg/prefix", "coqa/inducer_lora"])
def test_mixed_precision_trains_and_its_adapter_is_float32(
    name: str, root: Path, tmp_path: Path
) -> None:
    half, whole = tmp_path / "half", tmp_path / "whole"
    [rough] = finetune.train(recipe(name, root, half, "training.bf16=true"), QUIET)
    [exact] = finetune.train(recipe(name, root, whole), QUIET)
    for (_, a), (_, b) in zip(rough.losses, exact.losses, strict=True):
        assert a == pytest.approx(b, rel=2e-2)
    assert rough.losses != exact.losses
    assert {tensor.dtype for tensor in tensors(half).values()} == {torch.float32}


def test_samples_are_escaped(root: Path, tmp_path: Path) -> None:
    task = surgery.task("coqa")
    example = {"story": "<b>x", "turns": [], "question": "a & b?", "references": ["<i>"]}
    results.write_answers(tmp_path, task, {"dev": ([example], ["<script>"])})
    page = (tmp_path / "samples.html").read_text()
    assert "&lt;script&gt;" in page
    assert "a &amp; b?" in page
    assert "<script>" not in page
    assert json.loads((tmp_path / "answers.jsonl").read_text())["answer"] == "<script>"


@pytest.mark.parametrize(
    ("task", "other", "more", "part"),
    [
        ("webnlg", "roberta", [], "does not write text from left to right"),
        ("webnlg", "gpt2", ["data.max_new_tokens=1020"], "but the model has 1024 positions"),
        ("sst2", "roberta", ["data.max_length=9999", "LONG"], "positions|do not go through"),
        ("sst2", "vit", [], "cannot take a classification head"),
        ("sst2", "roberta", ["data.held_out=8"], "8 of 8 examples cannot be held out"),
    ],
)
def test_a_model_or_length_that_does_not_fit_is_named_before_anything_is_written(
    task: str, other: str, more: list[str], part: str, root: Path, tmp_path: Path
) -> None:
    model, data = tiny.prepared(task, root)
    if other == "vit":
        tr.ViTConfig().save_pretrained(tmp_path / "vit")
        model = tmp_path / "vit"
    elif other != tiny.FAMILY[task]:
        model, _ = tiny.prepared("sst2", root)
    if "LONG" in more:
        data = tiny.save_data(task, tmp_path / "data")
        text = (data / "train.tsv").read_text()
        (data / "train.tsv").write_text(text + "long " * 300 + "\t1\n")
    run = tmp_path / "run"
    overrides = [*tiny.overrides(task, model, data, run), *(m for m in more if m != "LONG")]
    with pytest.raises(RecipeError, match=part):
        finetune.train(read_recipe(find(f"{task}/lora"), overrides), QUIET)
    assert not run.exists()


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """Twice the batch in one process; no dropout, whose random numbers differ."""
    calm = ["training.label_smoothing_factor=0.0", "splice=[{method: inducer, dropout: 0.0}]"]
    calm += ["training.load_best_model_at_end=false", "patience=0"]
    model, data = tiny.prepared("webnlg", tmp_path)
    config = json.loads((model / "config.json").read_text())
    config |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    one, two = tmp_path / "one", tmp_path / "two"
    shared = [*tiny.overrides("webnlg", model, data, one), *calm]
    finetune.train(
        read_recipe(find("webnlg/inducer"), [*shared, "training.per_device_train_batch_size=4"]),
        QUIET,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    program += ["--master-port", str(port), "--no-python", sys.executable, "-c"]
    program += ["from surgery.cli import app; app()", "train", "webnlg/inducer"]
    environment = {k: v for k, v in os.environ.items() if k != "SURGERY_DATA"}
    done = subprocess.run(
        [*program, *shared, f"output={two}"],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("score it again with") == 1
    for key, tensor in tensors(one).items():
        torch.testing.assert_close(tensors(two)[key], tensor, atol=1e-5, rtol=1e-3)
    rows = [json.loads((run / "metrics.json").read_text())["rows"][0] for run in (one, two)]
    assert rows[0]["scores"].keys() == rows[1]["scores"].keys()
