"""Recipes: every shipped one loads and runs; mistakes are named before training starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tr
from rich.console import Console
from surgery_recipes import finetune
from surgery_recipes.tasks import make_task
from typer.testing import CliRunner

from surgery.cli import app
from surgery.errors import SurgeryError
from surgery.recipe import RecipeError, make_recipe, read_recipe
from tests.models import build

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
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
    steps += ["training.per_device_eval_batch_size=500", "training.disable_tqdm=true"]
    return read_recipe(path, [f"model={model}", f"output={output}", *steps])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_shipped_recipe_trains_scores_and_scores_the_same_again(
    path: Path, tiny: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    console = Console(quiet=True)
    rows = finetune.train(small(path, tiny, run), console)
    assert [row.what for row in rows] == ["frozen base, new head", "inducer + lora"]
    assert json.loads((run / "metrics.json").read_text())["rows"][1]["score"] == rows[1].score
    assert (run / "loss.png").stat().st_size > 1000
    assert finetune.evaluate(run, console) == rows[1].score


def test_the_bundled_sentences_are_split_and_labelled() -> None:
    task = make_task(read_recipe(RECIPES[0]))

    def tokenizer(texts: list[str], **_: Any) -> dict[str, Any]:
        return {"input_ids": [[0]] * len(texts)}

    splits = task.splits(tokenizer)
    assert (len(splits["train"]), len(splits["test"])) == (9070, 1000)
    assert sum(splits["test"]["labels"]) == 467


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
        ("data.file=nowhere.tsv", "nowhere.tsv: no such data file"),
        ("data.label=stars", "no column 'stars'"),
        ("splice=[{method: loar}]", r"no method 'loar'. Did you mean 'lora'\?"),
        ("model=package:not_there", "the package not_there is not installed"),
        ("nonsense", "write key=value"),
    ],
)
def test_a_mistake_is_named_before_training(override: str, part: str, tiny: Path) -> None:
    overrides = [f"model={tiny}", "training.use_cpu=true", override]
    with pytest.raises(SurgeryError, match=part):
        finetune.train(read_recipe(RECIPES[0], overrides), Console(quiet=True))


def test_numbers_in_overrides_are_numbers() -> None:
    recipe = read_recipe(RECIPES[0], ["training.learning_rate=1e-3"])
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
