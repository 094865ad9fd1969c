"""The quickstart trains on a tiny encoder, and mistakes in it are named before training starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import surgery
from surgery.errors import SurgeryError
from surgery_recipes.recipe_files import read_recipe
from surgery_recipes.run import finetune

QUICKSTART = Path(__file__).parents[3] / "recipes/quickstart.yaml"


def small(path: Path, model: Path, output: Path) -> Any:
    steps = ["training.max_steps=3", "training.logging_steps=1", "training.use_cpu=true"]
    steps += [
        "training.report_to=none",
        "training.per_device_eval_batch_size=500",
        "training.disable_tqdm=true",
    ]
    return read_recipe(path, [f"model={model}", f"output={output}", *steps])


def test_the_quickstart_trains_scores_and_scores_the_same_again(
    encoder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    console = Console(quiet=True)
    rows = finetune.train(small(QUICKSTART, encoder, run), console)
    assert [row.what for row in rows] == ["frozen base, new head", "inducer + lora"]
    assert json.loads((run / "metrics.json").read_text())["rows"][1]["score"] == rows[1].score
    assert (run / "loss.png").stat().st_size > 1000
    assert finetune.evaluate(run, console) == rows[1].scores


def test_the_bundled_sentences_are_split_and_labelled() -> None:
    recipe = read_recipe(QUICKSTART)
    splits = surgery.task(recipe.task, **recipe.data).splits()
    assert (len(splits["train"]), len(splits["test"])) == (9070, 1000)
    assert sum(example["label"] for example in splits["test"]) == 467


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("training.learning_rte=1", r"no 'learning_rte'. Did you mean 'learning_rate'\?"),
        ("task=sentence_clasification", r"Did you mean 'sentence_classification'\?"),
        ("data.max_lenght=3", r"no data option 'max_lenght'. Did you mean 'max_length'\?"),
        ("data.path=nowhere.tsv", "nowhere.tsv: no such data file"),
        ("data.label=stars", "no column 'stars'"),
        ("splice=[{method: loar}]", r"no method 'loar'. Did you mean 'lora'\?"),
        ("model=package:not_there", "the package not_there is not installed"),
        ("nonsense", "write key=value"),
        ("device=cuda", "torch finds no GPU here"),
        ("training.fp16=true", "training.fp16 is for a GPU"),
        ("training.bf16=no", "training.bf16=.no. must be true or false"),
        ("model=/nowhere/at/all", "no such folder"),
        ("patience=3", "Set training.load_best_model_at_end=true"),
        ("splice=[{method: lora, at: heads}]", "at must be attention or ffn"),
        ("limit={tset: 3}", r"no split 'tset'. Did you mean 'test'"),
    ],
)
def test_a_mistake_is_named_before_training(override: str, part: str, encoder: Path) -> None:
    run = encoder.parent / "run"
    overrides = [f"model={encoder}", "training.use_cpu=true", f"output={run}", override]
    with pytest.raises(SurgeryError, match=part):
        finetune.train(read_recipe(QUICKSTART, overrides), Console(quiet=True))
    assert not run.exists()
