"""Tables say what was measured."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from surgery_recipes.comparison import tables
from surgery_recipes.comparison.grid import cells
from tests.recipes.comparison.grids import finished, grid


def shown(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The head of a written table, and its rows without their names, by name."""
    lines = (folder / "table.md").read_text().splitlines()
    head, _, *rows = ([c.strip() for c in x.split("|")[1:-1]] for x in lines if x[:1] == "|")
    return head, {row[0]: row[1:] for row in rows}


def test_numbers_of_the_tables_are_means_of_the_seeds(tmp_path: Path) -> None:
    made = grid(tmp_path)
    values = {"prefix": [0.5, 0.52, 0.51], "inducer": [0.9, 0.92, 0.91], "lora": [0.4, 0.6, 0.5]}
    for cell in cells(made):
        finished(cell, values[cell.row][cell.seed - 1])
    assert tables.write(made, cells(made)) is not None
    head, rows = shown(tmp_path)
    parameters = ["% inserted", "% stored", "trainable", "minutes", "peak MiB"]
    assert head == ["row", *parameters, "accuracy", "paper"]
    assert rows["prefix"][5:] == ["0.51 ± 0.01", ""]
    assert rows["inducer"][5:] == ["0.91 ± 0.01*", "94.2"]
    assert rows["lora"][5] == "0.5 ± 0.1"  # no better than chance
    with (tmp_path / "table.csv").open() as file:
        numbers = {row["row"]: row for row in csv.DictReader(file)}
    assert float(numbers["inducer"]["accuracy_mean"]) == pytest.approx(0.91)
    assert float(numbers["inducer"]["accuracy_std"]) == pytest.approx(0.01)
    assert (numbers["inducer"]["runs"], numbers["inducer"]["trainable"]) == ("3", "1007")
    assert (numbers["inducer"]["accuracy_paper"], numbers["lora"]["accuracy_paper"]) == ("94.2", "")
    text = (tmp_path / "table.md").read_text()
    assert "| inducer | 0.50 | 0.25 | 1,007 | 1.0 |" in text
    assert "Made on: a machine, torch 2." in text
    assert "Welch's t-test" in text
    assert "<td>0.91 ± 0.01*</td>" in (tmp_path / "table.html").read_text()
    assert {"parameters.png", "length.png"} <= {path.name for path in tmp_path.iterdir()}


def test_an_error_rate_that_rises_is_not_marked(tmp_path: Path) -> None:
    made = grid(tmp_path, scores={"sst2": ["ter"]}, paper={})
    for cell in cells(made):
        value = {"prefix": 0.5, "inducer": 0.9, "lora": 0.2}[cell.row] + cell.seed / 1000
        finished(cell, 0.0, scores={"ter": value})
    tables.write(made, cells(made))
    marked = {row: cells[5].endswith("*") for row, cells in shown(tmp_path)[1].items()}
    assert marked == {"prefix": False, "inducer": False, "lora": True}


def test_one_seed_is_no_significance(tmp_path: Path) -> None:
    made = grid(tmp_path, seeds=[1])
    for cell in cells(made):
        finished(cell, {"prefix": 0.1, "inducer": 0.9, "lora": 0.5}[cell.row])
    tables.write(made, cells(made))
    assert not any(mark in str(shown(tmp_path)) for mark in "*±")


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    made = grid(tmp_path, scores={"sst2": ["accuracy", "ter"]}, given=["training.max_steps=2"])
    for cell in cells(made)[:4]:  # the first seed, and the second of the first row
        finished(cell, 0.5 + cell.seed / 10)
    tables.write(made, cells(made))
    text = (tmp_path / "table.md").read_text()
    assert "| 0.65 ± 0.071 (n=2) |" in text
    assert "| 0.6 (n=1) |" in text
    unfinished = ["inducer 2", "lora 2", "prefix 3", "inducer 3", "lora 3"]
    assert f"Not finished: {', '.join(f'sst2/{name}' for name in unfinished)}." in text
    assert "No sst2 ter: no TER today." in text
    assert "command line: training.max_steps=2" in text
