"""Comparing: a grid runs what is missing, and its tables say what was measured."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from surgery.errors import RecipeError
from surgery_recipes import compare, shipped, tables
from surgery_recipes.grid import Cell, Grid, cells, read_grid, recipe_of
from surgery_recipes.recipe import write_recipe
from tests.recipes import tiny

QUIET = Console(quiet=True)
TABLES = sorted((Path(shipped.__file__).parent / "tables").glob("*.yaml"))


def finished(cell: Cell, score: float, made: Grid | None = None, **more: Any) -> None:
    """Leave what a run of this cell would."""
    row = {
        "scores": {"accuracy": score}, "percent": 0.5, "stored": 0.25,
        "trainable": 1000 + len(cell.row), "seconds": 60.0, **more,
        "by_length": [[5, score], [9, score], [14, score], [30, score]],
    }  # fmt: skip
    cell.folder.mkdir(parents=True)
    about = {"machine": "a machine", "versions": {"torch": "2"}, "notes": {"ter": "no TER today"}}
    (cell.folder / "metrics.json").write_text(json.dumps({"rows": [row], **about}))
    if made is not None:
        write_recipe(recipe_of(made, cell), cell.folder / "recipe.yaml")


def grid(output: Path, **more: Any) -> Grid:
    shape: dict[str, Any] = {
        "title": "A table", "tasks": ["sst2"], "rows": ["prefix", "inducer", "lora"],
        "scores": {"sst2": ["accuracy"]}, "seeds": [1, 2, 3], "baseline": "prefix",
        "paper": {"inducer": {"sst2.accuracy": 94.2}}, "output": str(output),
    }  # fmt: skip
    return Grid(**{**shape, **more})


def shown(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The head of a written table, and its rows without their names, by name."""
    lines = (folder / "table.md").read_text().splitlines()
    head, _, *rows = ([c.strip() for c in x.split("|")[1:-1]] for x in lines if x[:1] == "|")
    return head, {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_a_shipped_grid_is_whole(path: Path) -> None:
    made = read_grid(path)
    assert f"surgery compare recipes/tables/{path.name}" in path.read_text().split("title:")[0]
    runs = cells(made)
    assert {cell.task for cell in runs} == set(made.tasks)
    assert {cell.row for cell in runs} == set(made.rows)
    known = {f"{task}.{name}" for task, names in made.scores.items() for name in names}
    assert {name for numbers in made.paper.values() for name in numbers} <= known
    assert set(made.paper) <= set(made.rows)


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


def test_a_folder_of_other_settings_is_no_result(root: Path, tmp_path: Path) -> None:
    _, data = tiny.prepared("sst2", root)
    before = grid(tmp_path, seeds=[1], given=[f"data={data}", "training.max_steps=150"])
    finished(cells(before)[0], 0.5, before)
    now = grid(tmp_path, seeds=[1], given=[f"data={data}", "training.max_steps=200"])
    with pytest.raises(RecipeError, match=r"training.max_steps=150, this grid asks for 200"):
        compare.compare(now, QUIET)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["training.lerning_rate=1"], "no 'lerning_rate'. Did you mean 'learning_rate'"),
        (["data=nowhere"], "data path nowhere: no such folder"),
        (["data.max_lenght=3"], "max_lenght"),
        (["training.learning_rate=abc"], "learning_rate='abc' must be a number"),
        (["training.per_device_train_batch_size=0"], "must be a whole number, 1 or more"),
        (["model=./nothing"], "'./nothing': no such folder"),
        (["limit={tst: 3}"], "no split 'tst'"),
        (["data.max_length=2"], "max_length=2 leaves next to nothing"),
    ],
)
def test_what_would_fail_in_every_run_is_found_before_any(
    given: list[str], part: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny.prepared("sst2", root)
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **o: pytest.fail("it ran"))
    own = [f"model={model}", f"data={data}", "data.held_out=2"]
    with pytest.raises(RecipeError, match=part):
        compare.compare(grid(tmp_path / "grid", given=[*own, *given]), QUIET)
    assert not (tmp_path / "grid").exists()


def test_a_score_that_the_task_does_not_give_is_found_before_any_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny.prepared("sst2", root)
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **o: pytest.fail("it ran"))
    own = [f"model={model}", f"data={data}", "data.held_out=2"]
    made = grid(tmp_path / "grid", given=own, scores={"sst2": ["acuracy"]}, paper={})
    with pytest.raises(RecipeError, match="gives no 'acuracy'"):
        compare.compare(made, QUIET)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("seeds: [1, 1]", "seeds has 1 twice"),
        ("row_set: {lora: training.max_steps=3}", "row_set of lora is 'training.max_steps=3'"),
        ("set: [{training: 3}]", "write a list of texts"),
        ("scores: {sst2: accuracy}", "scores of sst2 is 'accuracy'"),
    ],
)
def test_a_grid_with_values_of_the_wrong_kind_is_refused(
    line: str, part: str, tmp_path: Path
) -> None:
    key = line.partition(":")[0]
    lines = {"title": "title: a", "tasks": "tasks: [sst2]", "rows": "rows: [lora]"}
    lines |= {"scores": "scores: {sst2: [accuracy]}", key: line}
    (tmp_path / "grid.yaml").write_text("\n".join(lines.values()))
    with pytest.raises(RecipeError, match=part):
        read_grid(tmp_path / "grid.yaml")


def test_runs_share_the_gpus_that_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv(compare.GPUS, raising=False)
    assert compare.gpus() == ["0", "1"]
    monkeypatch.setenv(compare.GPUS, "2, GPU-77")
    assert compare.gpus() == ["2", "GPU-77"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert compare.gpus() == []  # named, but not there


def test_only_what_is_missing_is_run_and_the_unfinished_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny.prepared("sst2", root)
    row_set = {"lora": ["patience=0"]}
    made = grid(
        tmp_path,
        seeds=[1],
        set=["about=x"],
        row_set=row_set,
        given=[f"model={model}", f"data={data}", "data.held_out=2"],
    )
    first, second, third = cells(made)
    finished(first, 0.5, made)
    (second.folder / "checkpoints/checkpoint-3").mkdir(parents=True)
    write_recipe(recipe_of(made, second), second.folder / "recipe.yaml")
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        asked.append(command[3:])
        cell = next(c for c in (second, third) if f"output={c.folder}" in command)
        if cell is third:
            return type("Done", (), {"returncode": 1})
        (cell.folder / "metrics.json").write_text((first.folder / "metrics.json").read_text())
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(compare.subprocess, "run", run)
    assert compare.compare(made, QUIET) == [third]
    head = [
        "train",
        "sst2/inducer",
        "about=x",
        f"model={model}",
        f"data={data}",
        "data.held_out=2",
        "training.seed=1",
    ]
    assert asked[0] == [*head, f"output={second.folder}", "--resume"]
    assert asked[1][:3] == ["train", "sst2/lora", "about=x"]
    assert "patience=0" in asked[1]
    assert asked[1][-1] == "--overwrite"  # of what an interrupted run without checkpoints left
    assert "prefix" in (tmp_path / "table.md").read_text()


def test_a_grid_runs_and_is_shown(root: Path, tmp_path: Path) -> None:
    model, data = tiny.prepared("sst2", root)
    settings = [o for o in tiny.overrides("sst2", model, data, tmp_path) if "output=" not in o]
    output = tmp_path / "grid"
    made = grid(output, rows=["prefix", "lora"], seeds=[1], paper={}, given=settings)
    assert compare.compare(made, QUIET) == []
    log = (tmp_path / "grid/sst2/lora/1/log.txt").read_text()
    assert "surgery eval" in log
    assert len((tmp_path / "grid/table.md").read_text().splitlines()) > 5


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("titel: x", "unknown key 'titel'. Did you mean 'title'"),
        ("title: x", "the key 'tasks' is missing"),
        ("{title: x, tasks: [sst2], rows: [lroa], scores: {sst2: [a]}}", "Did you mean 'lora'"),
        ("{title: x, tasks: [sst2], rows: [lora], scores: {mnli: [a]}}", "which scores of task"),
        ("{title: x, tasks: [sst2], rows: [lora], scores: {sst2: [a]}, baseline: y}", "baseline"),
        ("{title: x, tasks: [sst2], rows: [lora], scores: {sst2: [a]}, seeds: 3}", "be a list"),
        ("{title: x, tasks: [sst2], rows: [lora], scores: {sst2: [a]}, seeds: []}", "one or more"),
        (
            "{title: x, tasks: [sst2], rows: [lora], scores: {sst2: [a]}, row_set: {lroa: []}}",
            "row_set has 'lroa'. Did you mean 'lora'",
        ),
        (
            "{title: x, tasks: [sst2], rows: [lora], scores: {sst2: [a]}, paper: {lora: {a: 1}}}",
            "paper of lora has 'a'",
        ),
    ],
)
def test_a_bad_grid_says_what_is_wrong(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(RecipeError, match=part):
        read_grid(tmp_path / "grid.yaml")
