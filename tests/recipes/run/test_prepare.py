"""Data and models that do not fit a recipe are refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as tr

from surgery.errors import RecipeError
from surgery_recipes.recipe_files import find_recipe, read_recipe
from surgery_recipes.run import finetune
from surgery_recipes.run.prepare import prepare_run
from tests.recipes import tiny
from tests.recipes.run.runs import QUIET, recipe


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
        finetune.train(read_recipe(find_recipe(f"{task}/lora"), overrides), QUIET)
    assert not run.exists()


@pytest.mark.parametrize(
    ("name", "more", "part"),
    [
        ("sst2/lora", ["training.metric_for_best_model=eval_acuracy"], "Did you mean 'accuracy'"),
        ("sst2/lora", ["training.optim=adamw_torch_npu_fused"], "transformers' Trainer refuses it"),
        ("sst2/lora", ["training.output_dir=x"], "checkpoints go below output=PATH"),
        ("sst2/lora", ["splice=[{method: lora, layers: 3}]"], r"layers must be \[first, last"),
        ("sst2/lora", ["splice=[{method: lora, layers: [0, 9]}]"], "of this model's layers 0 to 1"),
        ("sst2/lora", ["data.held_out=0.1"], "held_out=0.1 must be a whole number"),
        ("sst2/lora", ["data.held_out=many"], "held_out='many' must be a number"),
        ("webnlg/lora", ["baseline=true"], "no new head that could be trained alone"),
    ],
)
def test_what_cannot_be_is_said_before_a_step_is_taken(
    name: str, more: list[str], part: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=part):
        finetune.train(recipe(name, root, tmp_path / "run", *more), QUIET)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_drawn_sample_without_what_is_scored_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny.prepared("mnli", root)
    words = [*tiny.overrides("mnli", model, data, tmp_path), "limit.dev=1"]
    monkeypatch.setattr("random.Random.sample", lambda _, population, k: list(population)[:k])
    with pytest.raises(
        RecipeError, match=r"'accuracy_mismatched' cannot be computed.*Raise the limit"
    ):
        prepare_run(read_recipe(find_recipe("mnli/lora"), words))
