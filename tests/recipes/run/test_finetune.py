"""A run trains, scores, leaves its results, and is scored again from its files."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery_recipes.recipe_files import find_recipe, read_recipe
from surgery_recipes.run import finetune
from tests.recipes import tiny
from tests.recipes.run.runs import QUIET, recipe, tensors

KINDS = ["webnlg/mam_inducer", "coqa/fine_tuning", "coqa/prefix", "mnli/lora", "sst2/bitfit"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.few(3)
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


def test_the_command_line_shows_a_bar_with_the_loss(root: Path, tmp_path: Path) -> None:
    model, data = tiny.prepared("sst2", root)
    words = [w for w in tiny.overrides("sst2", model, data, tmp_path / "run") if "tqdm" not in w]
    shown = CliRunner().invoke(app, ["train", "sst2/lora", *words])
    assert shown.exit_code == 0, shown.output
    assert re.search(r"4/4 \[.*loss=\d", shown.stderr)


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
@pytest.mark.few(1)
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


@pytest.mark.slow
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
        read_recipe(
            find_recipe("webnlg/inducer"), [*shared, "training.per_device_train_batch_size=4"]
        ),
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
