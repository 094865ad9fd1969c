"""A finished run is diagnosed from its files, on the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery_recipes.diagnosis.lengths import by_length
from tests.recipes import tiny

FAST = ("training.max_steps=2", "training.warmup_steps=0", "training.learning_rate=1e-2")


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("task", ["sst2", "webnlg"])
def test_a_run_is_diagnosed(task: str, root: Path, tmp_path: Path) -> None:
    model, data = tiny.prepared(task, root)
    runner = CliRunner(env={"COLUMNS": "120"})
    for row in ("prefix", "lora"):
        own = tiny.overrides(task, model, data, tmp_path / row)
        done = runner.invoke(app, ["train", f"{task}/{row}", *own, *FAST])
        assert done.exit_code == 0, done.output
    both = [str(tmp_path / row) for row in ("prefix", "lora")]
    done = runner.invoke(app, ["diagnose", *both, "--minus", both[1], "--examples", "5"])
    assert done.exit_code == 0, done.output
    assert "attention to virtual keys" in done.output
    folder = tmp_path / "prefix/diagnosis"
    assert {p.name for p in folder.iterdir()} >= {
        "mass.csv", "mass.png", "updates.csv", "updates.png", "lengths.csv", "lengths.png",
        "losses.csv", "losses.png",
    }  # fmt: skip
    mass = read(folder / "mass.csv")
    assert {line["when"] for line in mass} == {"start", "end"}
    assert all(0 <= float(line["mass"]) <= 1 for line in mass if line["by"] == "head")
    starts = {line["mass"] for line in mass if line["when"] == "start" and line["by"] == "head"}
    assert starts != {
        line["mass"] for line in mass if line["when"] == "end" and line["by"] == "head"
    }
    keys = [line for line in read(folder / "updates.csv") if line["port"] == "merged"]
    assert keys
    assert all(float(line["moved"]) > 0 for line in keys)
    assert len({line["run"] for line in read(folder / "losses.csv")}) == 2
    done = runner.invoke(app, ["diagnose", both[1], "--examples", "5"])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "lora/diagnosis/mass.png").exists()
    ranks = [line["effective_rank"] for line in read(tmp_path / "lora/diagnosis/updates.csv")]
    assert all(float(rank) >= 1 for rank in ranks if rank)
    assert any(ranks)


def test_a_run_on_images_is_diagnosed_without_lengths(root: Path, tmp_path: Path) -> None:
    model, data = tiny.prepared("digits", root)
    own = tiny.overrides("digits", model, data, tmp_path / "run")
    runner = CliRunner(env={"COLUMNS": "120"})
    done = runner.invoke(app, ["train", "digits/prefix_none", *own, *FAST])
    assert done.exit_code == 0, done.output
    done = runner.invoke(app, ["diagnose", str(tmp_path / "run"), "--examples", "5"])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "run/diagnosis"
    assert all(0 < float(x["mass"]) < 1 for x in read(folder / "mass.csv") if x["by"] == "head")
    assert read(folder / "lengths.csv") == []
    assert not (folder / "lengths.png").exists()


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["diagnose", str(tmp_path)])
    assert done.exit_code == 1
    assert "no finished run here" in done.output
    assert list(tmp_path.iterdir()) == []


def test_scores_by_length_have_bands_and_can_be_subtracted() -> None:
    task = surgery.task("sst2", path="")
    examples = [{"label": 1, "texts": ["x"]} for _ in range(100)]
    lengths = list(range(100))
    answers = [int(i < 50) for i in range(100)]  # short ones are right
    bins = by_length(task, lengths, answers, examples)
    assert [b.score for b in bins] == [1.0] * 5 + [0.0] * 5
    assert [b.tokens for b in bins] == [4.5 + 10 * i for i in range(10)]
    less = by_length(task, lengths, answers, examples, [1] * 100)
    assert [b.score for b in less] == [0.0] * 5 + [-1.0] * 5
    mixed = by_length(task, [1] * 40, [i % 2 for i in range(40)], examples[:40])
    assert len(mixed) == 8
    assert all(b.low < b.score < b.high for b in mixed)
