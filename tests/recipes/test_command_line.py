"""The command line lists, locates, trains and compares, and shows errors whole."""

from __future__ import annotations

import json
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
    lines = listed.output.splitlines()
    assert len(lines) <= 40, "one screen"
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if "bitfit" in line and "x" in line]
    assert row.count(" x ") == 3  # digits, MNLI and SST-2
    told = runner.invoke(app, ["recipes", "--about"])
    assert told.exit_code == 0
    assert "coqa/gating: ablation Gating" in told.output
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


def test_runs_are_listed_filtered_told_apart_and_scored_from_any_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny.prepared("sst2", root)
    (tmp_path / "start").mkdir()
    (tmp_path / "start/data").symlink_to(data)
    (tmp_path / "start/model").symlink_to(model)
    monkeypatch.chdir(tmp_path / "start")
    runner = CliRunner(env={"COLUMNS": "120"})
    for rank in (2, 3):
        own = tiny.overrides("sst2", Path("model"), Path("data"), Path(f"runs/r{rank}"))
        set_here = ["training.max_steps=3", f"splice.lora.rank={rank}"]
        done = runner.invoke(app, ["train", "sst2/lora", *own, *set_here])
        assert done.exit_code == 0, done.output
    listed = runner.invoke(app, ["runs"])
    assert listed.exit_code == 0, listed.output
    assert listed.output.count("accuracy 0.") + listed.output.count("accuracy 1 ") == 2
    chosen = runner.invoke(app, ["runs", "--where", "method=lora", "--where", "task=sst2"])
    assert ("r2" in chosen.output, "r3" in chosen.output) == (True, True)
    none = runner.invoke(app, ["runs", "--where", "training.max_steps=4"])
    assert "no such run" in none.output
    wrong = runner.invoke(app, ["runs", "--where", "tusk=sst2"])
    assert (wrong.exit_code, "Did you mean 'task'?" in wrong.output) == (1, True)
    told = runner.invoke(app, ["runs", "runs/r2", "--diff", "runs/r3"])
    assert told.exit_code == 0, told.output
    assert "'rank': 2" in told.output
    assert "'rank': 3" in told.output
    same = runner.invoke(app, ["runs", "runs/r2", "--diff", "runs/r2"])
    assert "No difference" in same.output
    run = tmp_path / "start/runs/r2"
    losses = json.loads((run / "metrics.json").read_text())["rows"][-1]["losses"]
    assert [step for step, _ in losses] == [1, 2, 3], "a short run is drawn, too"
    monkeypatch.chdir(tmp_path)
    again = runner.invoke(app, ["eval", str(run), "limit.dev=4"])
    assert again.exit_code == 0, again.output
    refused = runner.invoke(app, ["eval", str(run), "splice.lora.rank=4"])
    assert (refused.exit_code, "was trained with" in refused.output) == (1, True)
    unknown = runner.invoke(app, ["train", "sst2/lora", "splice.lara.rank=4"])
    assert (unknown.exit_code, "Did you mean 'lora'?" in unknown.output) == (1, True)
