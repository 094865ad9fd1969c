"""The command line lists, locates, trains and compares, and shows errors whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from surgery.cli import app
from surgery.errors import RecipeError
from surgery_recipes.recipe_files import find_recipe
from tests.recipes import tiny


def test_errors_keep_their_brackets_and_lines() -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["train", "[/tmp]" + "x" * 100])
    assert shown.exit_code == 1
    assert "[/tmp]" + "x" * 100 in shown.output
    told = runner.invoke(app, ["compare", "small_nlu", "output=elsewhere"])
    assert "Use --output and --seeds" in told.output


def test_the_command_line_lists_methods_and_sites(encoder: Path) -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["methods"])
    assert listed.exit_code == 0
    assert "inducer" in listed.output
    located = runner.invoke(app, ["locate", str(encoder)])
    assert located.exit_code == 0, located.output
    assert "2 attention and 2 FFN sites" in located.output
    wrong = runner.invoke(app, ["train", "nowhere.yaml"])
    assert wrong.exit_code == 1
    assert "no such recipe" in wrong.output
    assert runner.invoke(app, ["eval", str(encoder)]).exit_code == 1


def test_the_command_line_lists_recipes_and_names_the_nearest() -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["recipes"])
    assert listed.exit_code == 0, listed.output
    assert "webnlg/inducer" in listed.output
    with pytest.raises(RecipeError, match=r"Did you mean 'webnlg/inducer'\?"):
        find_recipe("webnlg/induser")


def test_a_run_in_a_folder_with_brackets_is_trained_and_scored(root: Path, tmp_path: Path) -> None:
    model, data = tiny.prepared("sst2", root)
    output = tmp_path / "[/a]"
    own = [*tiny.overrides("sst2", model, data, output), "training.max_steps=1"]
    for words in (["train", "sst2/lora", *own, "about='[/x]'"], ["eval", str(output)]):
        done = CliRunner(env={"COLUMNS": "400"}).invoke(app, words)
        assert done.exit_code == 0, done.output
        assert str(output) in done.output
