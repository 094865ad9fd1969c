"""Tables say what was measured."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from surgery_recipes.comparison import tables
from surgery_recipes.comparison.claims import verdicts
from surgery_recipes.comparison.finished_runs import read_runs
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
    assert rows["prefix"][5:] == ["0.51 ± 0.0058", ""]
    assert rows["inducer"][5:] == ["0.91 ± 0.0058*", "94.2"]
    assert rows["lora"][5] == "0.5 ± 0.058"  # no better than chance
    with (tmp_path / "table.csv").open() as file:
        numbers = {row["row"]: row for row in csv.DictReader(file)}
    assert float(numbers["inducer"]["accuracy_mean"]) == pytest.approx(0.91)
    assert float(numbers["inducer"]["accuracy_std"]) == pytest.approx(0.01)
    assert (numbers["inducer"]["runs"], numbers["inducer"]["trainable"]) == ("3", "1007")
    assert (numbers["inducer"]["accuracy_paper"], numbers["lora"]["accuracy_paper"]) == ("94.2", "")
    text = (tmp_path / "table.md").read_text()
    assert "| inducer | 0.50 | 0.25 | 1,007 | 1.0 |" in text
    assert "Made on: a machine, torch 2." in text
    assert "± standard error, over seeds." in text
    assert "* better than prefix: paired by seeds and examples, p < 0.05 corrected by Holm" in text
    assert float(numbers["inducer"]["accuracy_gain"]) == pytest.approx(0.4)
    assert float(numbers["lora"]["accuracy_gain_p"]) > 0.5
    assert "<b>0.91</b><small>± 0.0058</small>" in (tmp_path / "table.html").read_text()
    assert {"parameters.png", "length.png"} <= {path.name for path in tmp_path.iterdir()}


def test_an_error_rate_that_rises_is_not_marked(tmp_path: Path) -> None:
    made = grid(tmp_path, scores={"sst2": ["ter"]}, paper={})
    for cell in cells(made):
        value = {"prefix": 0.5, "inducer": 0.9, "lora": 0.2}[cell.row] + cell.seed / 1000
        value += 0.001 * (cell.row == "lora") * cell.seed**2
        finished(cell, 0.0, scores={"ter": value})
    tables.write(made, cells(made))
    marked = {row: cells[5][-1] for row, cells in shown(tmp_path)[1].items()}
    assert (marked["inducer"], marked["lora"]) == ("†", "*")
    assert marked["prefix"] not in "†*"
    text = (tmp_path / "table.md").read_text()
    assert "* better than prefix; † worse than prefix: paired" in text


def test_without_a_significant_difference_nothing_is_called_better(tmp_path: Path) -> None:
    made = grid(tmp_path)
    for cell in cells(made):
        finished(cell, 0.5 + {"prefix": 3, "inducer": 5, "lora": 2}[cell.row] * cell.seed % 7 / 100)
    tables.write(made, cells(made))
    for name in ("table.md", "table.html"):
        text = re.sub("(?s)<style>.*?</style>", "", (tmp_path / name).read_text())
        assert not re.search(r"\b(better|beats|worse)\b", text)
        assert "No difference from prefix is significant" in text


def test_examples_alone_tell_an_error_with_one_seed(tmp_path: Path) -> None:
    made = grid(tmp_path, seeds=[1])
    noise = np.random.default_rng(0).normal(0, 0.02, 200)
    for cell in cells(made):
        score = {"prefix": 0.1, "inducer": 0.9, "lora": 0.11}[cell.row]
        own = np.random.default_rng(len(cell.row)).normal(0, 0.01, 200)
        finished(cell, score, resampled=(score + noise + own).tolist())
    tables.write(made, cells(made))
    rows = shown(tmp_path)[1]
    assert rows["inducer"][5].startswith("0.9 ± 0.02")
    assert rows["inducer"][5].endswith("*")
    assert not rows["lora"][5].endswith(("*", "†"))
    assert "± standard error, over examples." in (tmp_path / "table.md").read_text()


def test_claims_end_in_verdicts(tmp_path: Path) -> None:
    def claim(better: str, than: str) -> dict[str, str]:
        return {"better": better, "than": than, "score": "sst2.accuracy"}

    claims = {
        "The inducer is better": claim("inducer", "prefix"),
        "The prefix is better": claim("prefix", "inducer"),
        "LoRA is better": claim("lora", "prefix"),
    }
    made = grid(tmp_path, claims=claims)
    values = {"prefix": [0.5, 0.52, 0.51], "inducer": [0.9, 0.92, 0.91], "lora": [0.4, 0.6, 0.54]}
    for cell in cells(made):
        finished(cell, values[cell.row][cell.seed - 1])
    lines = read_runs(cells(made))
    found = {each.claim: each.verdict for each in verdicts(made, lines)}
    assert list(found.values()) == ["holds here", "contradicted here", "not decided"]
    alone = verdicts(made, [line for line in lines if line.row != "lora"])
    assert [each.verdict for each in alone][2] == "not measured"
    tables.write(made, cells(made))
    text = (tmp_path / "table.md").read_text()
    assert "sst2.accuracy: inducer 0.91, prefix 0.51, difference +0.4 (" in text
    assert ">contradicted here</span>" in (tmp_path / "table.html").read_text()


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
    assert "| 0.65 ± 0.05 (n=2) |" in text
    assert "| 0.6 (n=1) |" in text
    unfinished = ["inducer 2", "lora 2", "prefix 3", "inducer 3", "lora 3"]
    assert f"Not finished: {', '.join(f'sst2/{name}' for name in unfinished)}." in text
    assert "No sst2 ter: no TER today." in text
    assert "command line: training.max_steps=2" in text
