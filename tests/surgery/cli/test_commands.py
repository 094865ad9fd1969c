"""The command line: what it lists, names with brackets, errors without tracebacks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import surgery
from surgery.cli import app, lists
from surgery.plugin.registry import Registry
from surgery_recipes.comparison import grid as grids
from surgery_recipes.comparison.compare import run_grid
from tests.recipes.comparison.grids import finished, grid
from tests.support.entry_points import point

NAMES = ["[red]", "[/]", "[/a]", "[bold", ":smile:", "a[link=x]b", "\\[x]"]


def test_methods_are_listed_with_their_defaults() -> None:
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["methods"]).output
    assert all(name in shown for name in surgery.methods())
    assert "ranks={}" in shown
    assert "MISSING" not in shown
    assert f"surgery {surgery.__version__}" in shown


def test_doctor_shows_versions_and_the_health_of_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"])
    assert done.exit_code == 0
    assert torch.__version__ in done.output
    assert "does not load" not in done.output
    broken = Registry()
    with pytest.warns(RuntimeWarning, match="could not be loaded"):
        broken.load([point("lora", "plugin_that_is_missing")])
    monkeypatch.setattr("surgery.plugin.installed_plugins.registry", lambda: broken)
    monkeypatch.setattr("surgery.cli.plugins.plugin_problems", broken.problems)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "does not load" in next(x for x in done.output.splitlines() if "lora" in x)
    assert "No module named 'plugin_that_is_missing'" in done.output


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["train", "compare", "eval", "locate"])
def test_a_name_with_brackets_is_shown_as_it_is(command: str, name: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [command, str(tmp_path / name)])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert name in done.output


@pytest.mark.parametrize("name", NAMES[-3:])
@pytest.mark.few(1)
def test_a_table_with_brackets_in_its_names_is_shown(name: str, tmp_path: Path) -> None:
    made = grid(tmp_path / name, title=f"rank 8 {name}", seeds=[1])
    for cell in grids.cells(made):
        finished(cell, 0.5, made)
    console = Console(record=True, file=open(os.devnull, "w"), width=400)  # noqa: SIM115
    assert run_grid(made, console) == []
    console.file.close()
    shown = console.export_text()
    assert f"rank 8 {name}: 3 runs, 3 finished" in shown
    assert f"{tmp_path / name}/table.md" in shown


BAD = [
    "", "[", "3", "a: &a [*a]", "model: [m]\ntask: sst2", "{}", "model: m\ntask: ''",
    "model: " + "m" * 10_000 + "\ntask: sst2", "model: m\ntask: " + "t" * 10_000,
    "model: ''\ntask: sst2",
]  # fmt: skip
WRONG = [
    "splice: [{method: lora, ranks: x}]", "splice: [{method: lora, rank: [1]}]",
    "splice: [{method: lora, name: x, self: y}]", "splice: [{method: " + "x" * 10_000 + "}]",
    "training: {learning_rate: [1]}", "training: {seed: -1}", "training: {lr_scheduler_type: {}}",
    "data: {name: x}", "data: {path: 3}", "data: {path: [x]}", "data: {path: " + "x" * 400 + "}",
    "limit: {train: true}", "output: '\\0'", "output: " + "x" * 400, "output: ''",
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "text"),
    [
        *(("train", f"model: m\ntask: sst2\n{line}") for line in WRONG),
        *((command, text) for command in ("train", "compare", "eval") for text in BAD),
    ],
)
def test_a_bad_file_is_an_error_of_a_few_lines(
    command: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    done = CliRunner().invoke(app, [command, "." if command == "eval" else "recipe.yaml"])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert done.output.startswith("error: ")
    assert len(done.output) < 1200
    assert "SURGERY_TRACEBACK" not in done.output


def test_an_error_that_nobody_thought_of_has_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "shipped_recipes", lambda: 1 / 0)
    done = CliRunner().invoke(app, ["recipes"])
    assert done.exit_code == 1
    assert done.output.startswith("error: ZeroDivisionError: division by zero")
    monkeypatch.setenv("SURGERY_TRACEBACK", "1")
    assert isinstance(CliRunner().invoke(app, ["recipes"]).exception, ZeroDivisionError)


def test_a_file_name_that_is_no_text_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = CliRunner().invoke(app, ["eval", str(tmp_path / os.fsdecode(b"run\xff"))])
    assert done.exit_code == 1
    assert "run\\udcff: no recipe.yaml here" in done.output
