"""A grid is read and checked, and a bad one says what is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from surgery.errors import RecipeError
from surgery_recipes.comparison.grid import cells, read_grid
from surgery_recipes.comparison.titles import titled
from surgery_recipes.recipe_files import shipped_tables
from tests.recipes.comparison.grids import grid

TABLES = list(shipped_tables().values())


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


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("seeds: [1, 1]", "seeds has 1 twice"),
        ("row_set: {lora: training.max_steps=3}", "row_set of lora is 'training.max_steps=3'"),
        ("set: [{training: 3}]", "write a list of texts"),
        ("scores: {sst2: accuracy}", "scores of sst2 is 'accuracy'"),
        ("scores: {sst2: []}", "scores of sst2 is empty"),
        ("scores: [accuracy]", "it must be a dict"),
        ("tasks: [[sst2]]", "write a list of texts"),
        ("rows: [{a: 1}]", "write a list of texts"),
        ("title: [a]", "it must be a str"),
        ("seeds: [a]", "is 'a'; it must be a int"),
        ("seeds: [1.5]", "it must be a int"),
        ("paper: {lora: 3}", "paper of lora is 3; it must be a dict"),
        ("paper: {lora: {sst2.accuracy: [1]}}", "it must be a float"),
        ("baseline: [lora]", "it must be a str"),
        ("task_set: {sst2: {a: 1}}", "write a list of texts"),
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


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("titel: x", "unknown key 'titel'. Did you mean 'title'"),
        ("title: x", "the key 'tasks' is missing"),
        ("{title: x, tasks: [sst2], rows: [lroa], scores: {sst2: [a]}}", "Did you mean 'lora'"),
        ("{title: x, tasks: [sst2], rows: [lora], scores: {mnli: [a]}}", "no scores of task"),
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


def test_a_title_follows_the_overrides(tmp_path: Path) -> None:
    made = grid(
        tmp_path, title="SST-2, {training.max_steps} steps", set=["training.max_steps=5"],
        row_set={"lora": ["training.max_steps=7"]},
    )  # fmt: skip
    assert titled(made).title == "SST-2, 5 or 7 steps"
    assert (
        titled(dataclasses.replace(made, given=["training.max_steps=2"])).title == "SST-2, 2 steps"
    )
    with pytest.raises(RecipeError, match=r"no setting 'training.maxsteps'"):
        titled(dataclasses.replace(made, title="{training.maxsteps}"))
