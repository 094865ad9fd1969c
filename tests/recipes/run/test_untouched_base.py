"""Rows that train nothing of the base, and runs that leave what is tested on alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from surgery.errors import RecipeError
from surgery_recipes.recipe_files import find_recipe, read_recipe
from surgery_recipes.run import evaluate, prepare_run, train
from tests.recipes import tiny

QUIET = Console(quiet=True)


def test_of_an_untouched_decoder_nothing_is_trained(root: Path, tmp_path: Path) -> None:
    model, data = tiny.prepared("webnlg", root)
    own = tiny.overrides("webnlg", model, data, tmp_path / "run")
    [row] = train(read_recipe(find_recipe("webnlg/base"), own), QUIET)
    assert (row.what, row.trainable, row.inserted, row.seconds) == ("untouched base", 0, 0, 0.0)
    assert not (tmp_path / "run/model").exists()
    assert evaluate(tmp_path / "run", QUIET) == row.scores


def test_of_an_untouched_encoder_the_new_head_alone_is_trained(root: Path, tmp_path: Path) -> None:
    model, data = tiny.prepared("sst2", root)
    own = tiny.overrides("sst2", model, data, tmp_path / "run")
    [row] = train(read_recipe(find_recipe("sst2/base"), own), QUIET)
    assert row.what == "frozen base, new head"
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "run/model/model.safetensors")
    shared = set(before) & set(after)
    assert all(torch.equal(before[name], after[name]) for name in shared)
    head = {name for name in set(after) - shared if name.startswith("classifier.")}
    assert row.trainable == sum(after[name].numel() for name in head) > 0
    assert evaluate(tmp_path / "run", QUIET) == row.scores


def test_a_run_that_only_validates_has_no_test(root: Path, tmp_path: Path) -> None:
    """MNLI's validation has no mismatched pairs, so another score is the main one."""
    model, data = tiny.prepared("mnli", root)
    own = [*tiny.overrides("mnli", model, data, tmp_path / "run"), "validate_only=true"]
    recipe = read_recipe(find_recipe("mnli/lora"), own)
    assert set(prepare_run(recipe).examples) == {"train", "validation"}
    [row] = train(recipe, QUIET)
    assert row.scores == {"accuracy_matched": row.score}
    lines = (tmp_path / "run/answers.jsonl").read_text().splitlines()
    assert {json.loads(line)["set"] for line in lines} == {"validation"}


def test_a_task_without_validation_cannot_only_validate(encoder: Path) -> None:
    own = ["validate_only=true", f"model={encoder}", "baseline=false"]
    with pytest.raises(RecipeError, match=r"has no validation split.*Splits: train, test"):
        prepare_run(read_recipe(find_recipe("quickstart"), own))


def test_a_frozen_recipe_splices_nothing() -> None:
    with pytest.raises(RecipeError, match="frozen trains nothing but a new head"):
        read_recipe(find_recipe("sst2/lora"), ["frozen=true"])
