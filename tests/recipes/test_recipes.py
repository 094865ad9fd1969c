"""Recipes: every shipped one loads and runs; mistakes are named before training starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tr
from rich.console import Console
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery.errors import RecipeError, SurgeryError
from surgery_recipes import finetune
from surgery_recipes.recipe import make_recipe, read_recipe
from tests.support.models import build

QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a the film is good bad very not . , and it of to".split()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A tiny encoder with a tokenizer, saved as a local folder."""
    folder = tmp_path / "model"
    build("bert").save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tr.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def small(path: Path, model: Path, output: Path) -> Any:
    steps = ["training.max_steps=3", "training.logging_steps=1", "training.use_cpu=true"]
    steps += [
        "training.report_to=none",
        "training.per_device_eval_batch_size=500",
        "training.disable_tqdm=true",
    ]
    return read_recipe(path, [f"model={model}", f"output={output}", *steps])


def test_the_quickstart_trains_scores_and_scores_the_same_again(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    console = Console(quiet=True)
    rows = finetune.train(small(QUICKSTART, tiny, run), console)
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
    ("content", "part"),
    [
        ({"model": "m", "taks": "x"}, r"unknown key 'taks'. Did you mean 'task'\?"),
        ({"model": "m"}, "the key 'task' is missing"),
        ({"model": "m", "task": 3}, "task=3 must be a str"),
        ({"model": "m", "task": "t", "splice": [{"rank": 3}]}, "needs a key 'method'"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(content: dict[str, Any], part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        make_recipe(content)


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
def test_a_mistake_is_named_before_training(override: str, part: str, tiny: Path) -> None:
    run = tiny.parent / "run"
    overrides = [f"model={tiny}", "training.use_cpu=true", f"output={run}", override]
    with pytest.raises(SurgeryError, match=part):
        finetune.train(read_recipe(QUICKSTART, overrides), Console(quiet=True))
    assert not run.exists()


def test_numbers_in_overrides_are_numbers() -> None:
    recipe = read_recipe(QUICKSTART, ["training.learning_rate=1e-3"])
    assert recipe.training["learning_rate"] == 1e-3


def test_the_command_line_lists_methods_and_sites(tiny: Path) -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["methods"])
    assert listed.exit_code == 0
    assert "inducer" in listed.output
    located = runner.invoke(app, ["locate", str(tiny)])
    assert located.exit_code == 0, located.output
    assert "2 attention and 2 FFN sites" in located.output
    wrong = runner.invoke(app, ["train", "nowhere.yaml"])
    assert wrong.exit_code == 1
    assert "no such recipe" in wrong.output
    assert runner.invoke(app, ["eval", str(tiny)]).exit_code == 1
