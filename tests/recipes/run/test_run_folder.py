"""A run starts, stops and is resumed in its folder, and never replaces another one unasked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from surgery.errors import RecipeError
from surgery_recipes.run import finetune
from tests.recipes.run.runs import QUIET, recipe, stop_at, tensors


def test_a_finished_run_is_not_written_over_unasked(root: Path, tmp_path: Path) -> None:
    made = recipe("sst2/lora", root, tmp_path / "run")
    first = finetune.train(made, QUIET)
    with pytest.raises(RecipeError, match="holds the results of a finished run"):
        finetune.train(made, QUIET)
    assert (
        finetune.train(made, QUIET, finetune.RunOptions(overwrite=True))[0].losses
        == first[0].losses
    )


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
    with pytest.raises(RecipeError, match=r"holds an unfinished run\. Continue it with --resume"):
        finetune.train(made, QUIET)
    finetune.train(made, QUIET, finetune.RunOptions(resume=True))
    one, two = tensors(whole), tensors(broken)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    size = sum(f.stat().st_size for f in (whole / "checkpoints/checkpoint-4").glob("*.safetensors"))
    assert size == sum(f.stat().st_size for f in (whole / "adapter").glob("*.safetensors"))
    row = json.loads((broken / "metrics.json").read_text())["rows"][0]
    assert row["seconds"] > 100  # the seconds before the interruption count


def test_ctrl_c_saves_what_was_learnt_and_says_where(root: Path, tmp_path: Path) -> None:
    console = Console(record=True, file=open(os.devnull, "w"), width=300)  # noqa: SIM115
    made = recipe("sst2/inducer", root, tmp_path / "run")
    stop_at(3, made, console)
    console.file.close()
    assert f"interrupted at step 3: what was learnt is in {tmp_path}" in console.export_text()
    assert any(tensor.abs().sum() > 0 for tensor in tensors(tmp_path / "run").values())
    assert not (tmp_path / "run/metrics.json").exists()


def test_going_on_needs_the_same_settings(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = recipe("sst2/lora", root, run)
    stop_at(3, made)
    before = (run / "recipe.yaml").read_text()
    resume = finetune.RunOptions(resume=True)
    other = recipe("sst2/lora", root, run, "training.learning_rate=0.5")
    with pytest.raises(RecipeError, match=r"had training.learning_rate=.*, the run has 0\.5"):
        finetune.train(other, QUIET, resume)
    with pytest.raises(RecipeError, match="that run had splice="):
        finetune.train(recipe("sst2/inducer", root, run), QUIET, resume)
    assert (run / "recipe.yaml").read_text() == before
    finetune.train(made, QUIET, resume)
    written = (run / "metrics.json").read_text()
    with pytest.raises(RecipeError, match=r"holds a finished run\. Score it again"):
        finetune.train(made, QUIET, resume)
    assert (run / "metrics.json").read_text() == written


@pytest.mark.parametrize("name", ["sst2/prefix", "webnlg/inducer", "coqa/fine_tuning"])
@pytest.mark.few(1)
def test_a_run_that_was_stopped_while_it_was_scored_is_only_scored(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    kept = ["training.save_strategy=no", "training.load_best_model_at_end=false", "patience=0"]
    kept += ["training.eval_strategy=no"]
    [expected] = finetune.train(recipe(name, root, whole, *kept), QUIET)
    made = recipe(name, root, broken, *kept)
    console = Console(record=True, file=open(os.devnull, "w"), width=300)  # noqa: SIM115
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "answers", pressed)
        with pytest.raises(KeyboardInterrupt):
            finetune.train(made, console)
    console.file.close()
    assert "training is over, --resume scores it" in console.export_text()
    with pytest.raises(RecipeError, match="holds an unfinished run"):
        finetune.train(made, QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "make_trainer", lambda *a: pytest.fail("it trained again"))
        [row] = finetune.train(made, QUIET, finetune.RunOptions(resume=True))
    assert row.scores == expected.scores
    assert (row.inserted, row.trainable, row.percent) == (
        expected.inserted, expected.trainable, expected.percent,
    )  # fmt: skip
    assert json.loads((broken / "metrics.json").read_text())["rows"][0]["scores"] == row.scores


def pressed(*args: Any) -> Any:
    raise KeyboardInterrupt


def test_what_an_interrupted_run_has_learnt_is_not_written_over_unasked(
    root: Path, tmp_path: Path
) -> None:
    kept = ["training.save_strategy=no", "training.load_best_model_at_end=false", "patience=0"]
    made = recipe("sst2/lora", root, tmp_path / "run", *kept, "training.eval_strategy=no")
    stop_at(3, made)
    before = tensors(tmp_path / "run")
    with pytest.raises(RecipeError, match="holds what an interrupted run learnt"):
        finetune.train(made, QUIET)
    with pytest.raises(RecipeError, match="no checkpoint to resume from"):
        finetune.train(made, QUIET, finetune.RunOptions(resume=True))
    assert all(torch.equal(t, before[n]) for n, t in tensors(tmp_path / "run").items())
    finetune.train(made, QUIET, finetune.RunOptions(overwrite=True))


def test_a_folder_that_cannot_be_written_to_is_said_first(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in ("file", "file/below"):
        with pytest.raises(RecipeError, match="file is not a folder that can be written to"):
            finetune.train(recipe("sst2/lora", root, tmp_path / output), QUIET)
